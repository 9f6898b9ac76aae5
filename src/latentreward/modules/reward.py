"""Training of a latent reward model on preference pairs; no formula."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from latentreward.backbones.base import DiffusionBackbone
from latentreward.contracts import CrossScores, FeatureSpec, PairScores, PreferenceBatch
from latentreward.errors import InputError
from latentreward.heads import EmbeddingHead, RewardHead
from latentreward.losses import PreferenceLoss, gather_with_grad
from latentreward.modules.images import latents_of
from latentreward.modules.pair_noise import PairDraws
from latentreward.modules.pairs import EncodedPairs, PairModule, check_sigmas
from latentreward.modules.sharding import shard
from latentreward.noise import LevelSampler
from latentreward.scoring import RewardModel
from latentreward.scoring.layouts.config import exif_of
from latentreward.scoring.layouts.recipe import recipe_in_python
from latentreward.scoring.layouts.run import SETTINGS

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from latentreward.encoders.vae import LatentEncoder


class RewardModule(PairModule):
    """Module that trains a reward model, any backbone with any head, with any preference loss.

    Args:
        backbone: Backbone that gives features; it owns the encoders and the noise process.
        head: Function that makes the head from the backbone's feature spec.
        loss: Preference loss.
        levels: Sampler of a training pair's timestep.
        ensemble_sigmas: Noise levels of an additional evaluation with the head's ensemble score; empty for none.
        options: See :class:`~latentreward.modules.pairs.PairModule`.

    Raises:
        InputError: If no evaluation level is given or one is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead],
        loss: PreferenceLoss,
        levels: LevelSampler,
        ensemble_sigmas: Sequence[float] = (),
        **options: Any,
    ) -> None:
        if not isinstance(backbone, DiffusionBackbone):
            raise InputError(f"backbone is {backbone!r}, not a DiffusionBackbone; let its function return one")
        super().__init__(backbone.noise_process, backbone.source, loss, levels, **options)
        self.model = RewardModel(backbone, head(backbone.feature_spec))
        if not self.model.head.reads_text:
            backbone.drop_text_taps()
        if not self.model.head.reads_temb:
            backbone.drop_time_embedding()
        with suppress(InputError):  # raised when the model is saved instead
            self.model.recipe = recipe_in_python(backbone, self.model.head)
        check_sigmas(ensemble_sigmas=ensemble_sigmas)
        with torch.device("cpu"):
            self.ensemble_timesteps = self.noise_process.timesteps_at(torch.tensor([float(s) for s in ensemble_sigmas]))
        if ensemble_sigmas:
            self._add_metrics("ensemble")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore whether EXIF orientation was applied to the training images; earlier versions ignored EXIF."""
        super().on_load_checkpoint(checkpoint)
        self.model.exif = exif_of(checkpoint.get("exif", "ignore"))

    def on_train_start(self) -> None:
        """Record whether the training data apply EXIF orientation; warn if a resumed run changes that."""
        exif = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "exif", None)
        if exif is None:
            return
        if self.trainer.ckpt_path is not None and exif != self.model.exif:
            logger.warning(
                "resume: the checkpoint was trained with exif: %s, the training data now have exif: %s; set the "
                "reader's exif to go on as before",
                self.model.exif,
                exif,
            )
        self.model.exif = exif

    def configure_model(self) -> None:
        """Shard weights over the ranks under Lightning's ``ModelParallelStrategy`` (FSDP2); see :mod:`.sharding`."""
        if self.device_mesh is not None:
            shard(self, self.model.backbone, self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the EXIF setting and, if the run writes no ``config.yaml``, how to build the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["exif"] = self.model.exif
        built = {"backbone": self.model.backbone.built_by, "head": self.model.head.built_by}
        saved = any(isinstance(callback, SaveConfigCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if not saved and None not in built.values():
            training = {"module": f"{type(self).__module__}.{type(self).__qualname__}"}
            checkpoint[SETTINGS] = {"training": training, **{part: asdict(made) for part, made in built.items()}}

    def encode(self, batch: PreferenceBatch, draws: PairDraws, noise_per_image: bool = False) -> EncodedPairs:
        """See :meth:`PairModule.encode`."""
        latents = latents_of(self.model.backbone, batch, draws, self.posterior)
        if batch.conditioning is None:
            conditioning, uncond = self.model.encode_prompts(batch.prompts)
        else:
            conditioning, uncond = self.model.take_prompts(batch.conditioning, batch.uncond)
        noise = draws.normal("noise", latents.shape[1:], noise_per_image).to(latents.device)
        return EncodedPairs(latents.float(), noise, conditioning.select([*range(len(batch))] * 2), uncond)

    def score(
        self, batch: PreferenceBatch, encoded: EncodedPairs, timesteps: Tensor, with_cross: bool = False
    ) -> PairScores:
        """See :meth:`PairModule.score`; ``with_cross`` takes B forward passes with a head that has no embeddings."""
        noisy, head = self.add_noise(encoded, timesteps), self.model.head
        cross = None
        if with_cross and not isinstance(head, EmbeddingHead):
            cross = self._every_prompt_with_every_image(noisy, timesteps, encoded)
            rewards = torch.cat([cross.chosen.diagonal(), cross.rejected.diagonal()])
        else:
            features = self.model.read(noisy, timesteps, encoded.conditioning, encoded.uncond)
            if with_cross:
                image_embeds, text_embeds = head.embed(features)
                rewards = head.similarity(image_embeds, text_embeds)
                cross = self._gathered_similarities(image_embeds, text_embeds)
            else:
                rewards = head(features)
        chosen, rejected = rewards.float().chunk(2)
        chosen_sigmas, rejected_sigmas = self.noise_process.sigma(timesteps).to(rewards.device).chunk(2)
        return PairScores(chosen, rejected, batch.label, batch.weight, chosen_sigmas, rejected_sigmas, cross)

    def _gathered_similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> CrossScores:
        """Compute similarities over the batches of all ranks, with gradient to the rank that owns a row."""
        chosen, rejected = (gather_with_grad(half) for half in image_embeds.chunk(2))
        text = gather_with_grad(text_embeds.chunk(2)[0])
        matrix = self.model.head.similarity_matrix
        return CrossScores(matrix(text, chosen), matrix(text, rejected))

    def _every_prompt_with_every_image(self, noisy: Tensor, timesteps: Tensor, encoded: EncodedPairs) -> CrossScores:
        """Score every image with every prompt for a head that reads both together: B passes over this rank's 2B images.

        Negatives come from this rank only, and weights are normalised over this rank only.
        """
        pairs = len(noisy) // 2
        rows = []
        for prompt in range(pairs):
            conditioning = encoded.conditioning.select([prompt] * len(noisy))
            rewards = self.model(noisy, timesteps, conditioning, encoded.uncond).float()
            if rewards.ndim > 1:
                raise InputError("in-batch negatives need a head with one output; set out_dim: 1 or mode: pair")
            rows.append(rewards)
        return CrossScores(*torch.stack(rows).chunk(2, dim=1))

    @property
    def latent_decoder(self) -> "LatentEncoder | None":
        """See :attr:`PairModule.latent_decoder`."""
        return self.model.backbone.vae

    @property
    def cross_spans_ranks(self) -> bool:
        """See :attr:`PairModule.cross_spans_ranks`; false for heads that read image and prompt together."""
        return isinstance(self.model.head, EmbeddingHead)

    def score_ensemble(self, batch: PreferenceBatch, encoded: EncodedPairs) -> PairScores:
        """Score each pair with the head's ensemble over ``ensemble_sigmas``; the returned sigmas are their mean."""
        levels = []
        for timestep in self.ensemble_timesteps:
            timesteps = timestep.repeat(2 * len(batch))
            noisy = self.add_noise(encoded, timesteps)
            levels.append(self.model.read(noisy, timesteps, encoded.conditioning, encoded.uncond))
        chosen, rejected = self.model.head.score_ensemble(levels).float().chunk(2)
        sigma = self.noise_process.sigma(self.ensemble_timesteps).mean().to(chosen.device)
        sigmas = sigma.repeat(len(batch))
        return PairScores(chosen, rejected, batch.label, batch.weight, sigmas, sigmas)

    def _evaluate_more(self, batch: PreferenceBatch, encoded: EncodedPairs) -> None:
        if len(self.ensemble_timesteps):
            self._update("ensemble", self.score_ensemble(batch, encoded))
