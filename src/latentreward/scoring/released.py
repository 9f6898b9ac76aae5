"""Loading of the two papers' published checkpoints as reward models, from local folders."""

from __future__ import annotations

from pathlib import Path

from latentreward.heads.clip_projection import MultiScale
from latentreward.scoring.layouts.published import PUBLISHED_RMS_EPS, PublishedDiNaLRM, PublishedLRM, PublishedSettings
from latentreward.scoring.reward_model import RewardModel


def load_lrm(
    folder: str | Path,
    base: str | None = None,
    guidance: float = 7.5,
    multi_scale: MultiScale | None = None,
) -> RewardModel:
    """Load an LRM checkpoint in the layout of ``casiatao/LRM`` (MIT), frozen and in evaluation mode.

    The layout has ``unet/``, ``text_encoder/`` (SDXL: ``text_encoder_2/`` too) and ``state_dict.pt``. Tokenizers, VAE,
    scheduler, and text encoders that were frozen in training come from the base pipeline.

    Args:
        folder: Folder of the checkpoint.
        base: Diffusers pipeline folder or hub id of the base model. With None the model has neither tokenizers nor a
            VAE, and takes only token ids and latents.
        guidance: See :class:`~latentreward.scoring.PublishedSettings`.
        multi_scale: See :class:`~latentreward.scoring.PublishedSettings`.

    Raises:
        InputError: If a file is missing, or a tensor is missing, unexpected or has the wrong shape.
    """
    settings = PublishedSettings(guidance=guidance, multi_scale=multi_scale)
    return PublishedLRM(folder, base, settings).load(RewardModel)


def load_dina_lrm(
    folder: str | Path,
    base: str | None = None,
    rms_eps: float = PUBLISHED_RMS_EPS,
    t5_length: int = 256,
) -> RewardModel:
    """Load a DiNa-LRM checkpoint in the layout of ``liuhuohuo/DiNa-LRM-SD35M-12layers`` (Apache-2.0), frozen.

    The layout has ``config.json``, ``checkpoint/backbone_lora/`` (peft) and ``checkpoint/rm_head.pt``.

    Args:
        folder: Folder of the checkpoint.
        base: Diffusers folder or hub id of the base model; None takes the one that ``config.json`` names. A folder
            with only ``transformer/`` and ``scheduler/`` is enough to score latents with encoded prompts.
        rms_eps: See :class:`~latentreward.scoring.PublishedSettings`.
        t5_length: See :class:`~latentreward.scoring.PublishedSettings`.

    Raises:
        InputError: If a file is missing, a tensor is missing, unexpected or has the wrong shape, or ``config.json`` has
            a value that this loader does not support.
    """
    settings = PublishedSettings(rms_eps=rms_eps, t5_length=t5_length)
    return PublishedDiNaLRM(folder, base, settings).load(RewardModel)
