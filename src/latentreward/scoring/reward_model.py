"""A trained reward model: loads from files, scores images and latents, and is saved for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor

from latentreward.contracts import Conditioning
from latentreward.devices import find_device
from latentreward.errors import InputError, check_at_least_one
from latentreward.heads.clip_projection import MultiScale
from latentreward.scoring.batched_scoring import prompt_of_each, score_given_latents, score_images
from latentreward.scoring.hub import upload
from latentreward.scoring.images import ImageInput, Images, as_images, doubts_of_pixels
from latentreward.scoring.layouts.card import Card
from latentreward.scoring.layouts.published import PUBLISHED_RMS_EPS, PublishedDiNaLRM, PublishedLRM, PublishedSettings
from latentreward.scoring.network import RewardNetwork
from latentreward.scoring.scoring_noise import ScoringNoise, check_noise


class RewardModel(RewardNetwork):
    """Scores images and latents, at the noise levels of its own or at given ones; see :class:`RewardNetwork`."""

    @classmethod
    def of(cls, network: RewardNetwork) -> Self:
        """The reward model of a loaded network: the same parts and settings."""
        model = cls(network.backbone, network.head)
        for name in ("noise", "image_sizes", "exif", "source", "dtype", "calibration", "recipe", "published"):
            setattr(model, name, getattr(network, name))
        return model.train(network.training)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        base: str | None = None,
        config: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        published: PublishedSettings | None = None,
    ) -> Self:
        """Load a reward model, frozen and ready to score.

        Args:
            source: Folder or hub id of a model that :meth:`save_pretrained` wrote, or of a published layout
                (``casiatao/LRM``, ``liuhuohuo/DiNa-LRM-SD35M-12layers``), or a checkpoint or run of this
                program. A hub id may go on with a folder in the repository.
            revision: Branch, tag or commit of a hub id.
            base: Pipeline of the frozen weights, if not the one that the model names.
            config: Settings of a run, if not beside its checkpoint.
            device: Where it goes.
            dtype: Precision of the backbone; head and score are always float32.
            trust_remote_code: Whether the model's settings may name classes that are not registered, which are then
                imported; see :mod:`~latentreward.scoring.layouts.trust`.
            published: Settings that the files of a published layout do not hold; None takes the defaults. Those in use
                are logged, and are in :attr:`published` and :attr:`identity`.

        Raises:
            InputError: If a file is missing or damaged, or does not fit, the hub does not have it, or there is no such
                device.
        """
        from latentreward.scoring.layouts.find import find_reward

        target = find_device(device)
        stored = find_reward(
            str(source), config, base, revision=revision, trusted=trust_remote_code, published=published
        )
        model = cls.of(stored.load()).to(target).set_precision(dtype)
        model.source = str(source) if revision is None else f"{source}@{revision}"
        return model

    def save_pretrained(self, folder: str | Path, card: Card | None = None, *, base: str | None = None) -> None:
        """Write the model's own weights, settings and model card.

        ``folder`` gets its name when it is whole, and loads to the same scores, bit for bit. The files are described
        in :mod:`~latentreward.scoring.layouts.model_folder`.

        Args:
            folder: Made; an empty folder, or an older model folder, gives way.
            card: What the model card says beside what the model itself tells.
            base: Name of the base for others, e.g. a hub id (``owner/name@revision``), where this model was loaded on
                a local copy; by default the name of the copy's folder, which must then be given to load the model.

        Raises:
            InputError: If the model was put together in Python and has no recipe, cannot score images for want of a
                VAE or text encoder, holds weights that are not finite, or ``folder`` holds anything else.
        """
        from latentreward.scoring.layouts.saving import save_pretrained

        save_pretrained(self, Path(folder), card or Card(), base)

    def push_to_hub(self, repo_id: str, card: Card | None = None, *, base: str | None = None, **options: Any) -> str:
        """Put what :meth:`save_pretrained` writes on the hub, as one commit; returns its address.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            card: See :meth:`save_pretrained`.
            base: See :meth:`save_pretrained`.
            options: ``private``, ``token``, ``revision`` and ``commit_message``: see
                :func:`~latentreward.scoring.hub.upload`.

        Raises:
            InputError: As :meth:`save_pretrained`, or if the hub does not answer or refuses.
        """
        card = card or Card()
        with TemporaryDirectory() as place:
            folder = Path(place) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, replace(card, name=card.name or repo_id), base=base)
            return upload(folder, repo_id, **options)

    def score(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        *,
        noise: ScoringNoise | None = None,
        batch_size: int = 8,
        value_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """Scores ``(N,)``, float32 on the CPU, of N images, each for its own prompt: N scores, never N × N.

        A score depends on neither the batch nor the order but for rounding (about 2e-5 on a CPU in float32; the same
        bits in batches of one shape): prompts are encoded one by one, and noise is drawn by prompt, seed, level and
        shape. It carries a gradient if ``images`` is a tensor that requires one.

        What looks wrong is logged, once for each model: a tensor that seems to lie in [0, 1] or has a size that the
        model was not trained on, images that fit none of its buckets, and empty prompts.

        Args:
            prompts: N prompts; a single text is the prompt of all images.
            images: N images of any size: PIL images of any mode, paths, encoded bytes, ``ImageRef`` or uint8 arrays
                ``(H, W, 3)``, also as one array ``(N, H, W, 3)``; each is turned as ``exif`` says and brought to the
                model's size by ``image_sizes``. Or a floating point tensor ``(N, 3, H, W)``, which is scored at its
                own size. A single image, ``(3, H, W)`` of a tensor, gives one score, ``(1,)``.
            noise: Levels and draws; the model's own by default.
            batch_size: Images per pass; images of one size make a batch.
            value_range: Lowest and highest value of a tensor's pixels, e.g. ``(0, 1)``; None takes (-1, 1), and warns
                of a tensor that seems to lie in [0, 1].

        Raises:
            InputError: If the numbers differ, an image cannot be read, or a score is not finite.
        """
        levels = [self.noise if noise is None else noise]
        return self.score_levels(prompts, images, levels, batch_size=batch_size, value_range=value_range)[:, 0]

    def score_levels(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Images,
        levels: Sequence[ScoringNoise],
        *,
        batch_size: int = 8,
        value_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """Scores ``(N, K)``, float32 on the CPU, under each of K settings of noise; images are encoded once.

        Args:
            prompts: As :meth:`score`.
            images: As :meth:`score`.
            levels: K settings.
            batch_size: Images per pass.
            value_range: As :meth:`score`.

        Raises:
            InputError: As :meth:`score`, or if there are no levels.
        """
        if isinstance(levels, ScoringNoise) or not levels:
            raise InputError(f"levels is {levels!r}; give a list of at least one ScoringNoise")
        for noise in levels:
            check_noise(noise)
        check_at_least_one(batch_size=batch_size)
        given = as_images(images, value_range)
        texts = prompt_of_each(prompts, len(given))
        if isinstance(given, Tensor) and value_range is None:
            for kind, doubt in doubts_of_pixels(given, self.image_sizes).items():
                self.warn_once(kind, doubt)
        self._doubt_empty(texts)
        return score_images(self, texts, given, levels, batch_size)

    def _doubt_empty(self, prompts: Sequence[str]) -> None:
        if empty := sum(not prompt.strip() for prompt in prompts):
            text = "the score then says nothing of how well an image fits a text"
            self.warn_once("prompt", f"{empty} of {len(prompts)} prompts are empty; {text}")

    def score_latents(
        self,
        prompts: str | Sequence[str],
        latents: Tensor,
        *,
        noise: ScoringNoise | None = None,
        draws: Tensor | None = None,
        conditioning: tuple[Conditioning, Conditioning | None] | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Scores ``(N,)``, float32, of clean latents, noised here, each for its own prompt.

        They carry a gradient if ``latents`` requires one; without, no graph is built.

        Args:
            prompts: N prompts, or a single text for all; with ``conditioning`` they only name the noise.
            latents: ``(N, C, ...)`` clean and scaled, of any spatial shape that the network takes.
            noise: Levels and draws; the model's own by default.
            draws: ``(N, C, ...)`` noise to use at every level instead of drawn noise, as the released DiNa-LRM does in
                an ensemble; zeros leave the latents clean but for their scale.
            conditioning: N encoded prompts, and the empty prompt in one row (None encodes it if the head asks for it).
            batch_size: Latents per pass; None takes all at once.

        Raises:
            InputError: If numbers or shapes differ, a level lies outside the noise process, or a score is not finite.
        """
        check_at_least_one(batch_size=batch_size)
        if noise is not None:
            check_noise(noise)
        if latents.ndim < 3 or not latents.is_floating_point():
            shape = tuple(latents.shape)
            raise InputError(f"latents are a {latents.dtype} tensor of shape {shape}; give floating point (N, C, ...)")
        if draws is not None and draws.shape != latents.shape:
            shapes = f"{tuple(draws.shape)}, but latents {tuple(latents.shape)}"
            raise InputError(f"draws have shape {shapes}; give as many numbers as the latents have")
        if conditioning is not None and len(conditioning[0].prompt_embeds) != len(latents):
            rows = len(conditioning[0].prompt_embeds)
            raise InputError(f"conditioning has {rows} rows for {len(latents)} latents; give one row for each")
        texts = prompt_of_each(prompts, len(latents))
        if conditioning is None:
            self._doubt_empty(texts)
        size = batch_size or max(len(latents), 1)
        return score_given_latents(self, texts, latents, noise or self.noise, draws, conditioning, size)


def load_lrm(
    folder: str | Path,
    base: str | None = None,
    guidance: float = 7.5,
    multi_scale: MultiScale | None = None,
) -> RewardModel:
    """Load an LRM checkpoint of the layout of ``casiatao/LRM`` (MIT), ready to score.

    The layout holds ``unet/``, ``text_encoder/`` (SDXL: ``text_encoder_2/`` too) and ``state_dict.pt``; tokenizers,
    VAE and scheduler come from the base pipeline, and so do text encoders that were frozen in training.

    Args:
        folder: Folder of the checkpoint.
        base: Diffusers pipeline folder or hub id of the base model; without it only token ids and latents can be
            scored.
        guidance: See :class:`~latentreward.scoring.PublishedSettings`.
        multi_scale: See :class:`~latentreward.scoring.PublishedSettings`.

    Raises:
        InputError: If a file is missing, or a tensor is missing, left over or of another shape.
    """
    settings = PublishedSettings(guidance=guidance, multi_scale=multi_scale)
    return RewardModel.of(PublishedLRM(folder, base, settings).network())


def load_dina_lrm(
    folder: str | Path,
    base: str | None = None,
    rms_eps: float = PUBLISHED_RMS_EPS,
    t5_length: int = 256,
) -> RewardModel:
    """Load a DiNa-LRM checkpoint of the layout of ``liuhuohuo/DiNa-LRM-SD35M-12layers`` (Apache-2.0), ready to score.

    The layout holds ``config.json``, ``checkpoint/backbone_lora/`` (peft) and ``checkpoint/rm_head.pt``.

    Args:
        folder: Folder of the checkpoint.
        base: Diffusers folder or hub id of the base model; None takes the one that ``config.json`` names. A folder
            with nothing but ``transformer/`` and ``scheduler/`` will do for latents and embeddings.
        rms_eps: See :class:`~latentreward.scoring.PublishedSettings`.
        t5_length: See :class:`~latentreward.scoring.PublishedSettings`.

    Raises:
        InputError: If a file is missing, or a tensor is missing, left over or of another shape, or the config asks for
            something this loader does not know.
    """
    settings = PublishedSettings(rms_eps=rms_eps, t5_length=t5_length)
    return RewardModel.of(PublishedDiNaLRM(folder, base, settings).network())


def normalise_score(raw: Tensor) -> Tensor:
    """``(raw + 10) / 10``: the scale on which DiNa-LRM reports its scores."""
    return (torch.as_tensor(raw) + 10) / 10
