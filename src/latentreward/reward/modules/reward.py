"""Training of a latent reward model on preference pairs: its encoding and scoring; the step is in ``pairs.py``."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset

from latentreward.core.contracts import CrossScores, FeatureSpec, PairScores, PreferenceBatch
from latentreward.core.errors import InputError, check_once, check_range
from latentreward.core.storage.json_files import checked
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import ExifOrientation
from latentreward.diffusion import DiffusionBackbone, LevelSampler
from latentreward.diffusion.backbones.loading import check_process
from latentreward.reward.heads.base import EmbeddingHead, RewardHead
from latentreward.reward.losses.base import PreferenceLoss, gather_with_grad
from latentreward.reward.modules.based import unseen_settings
from latentreward.reward.modules.pairs import EncodedPairs, PairDraws, PairModule, latents_of
from latentreward.reward.modules.sharding import shard
from latentreward.reward.scoring.layouts.model_folder import sizes_of, sizes_record
from latentreward.reward.scoring.layouts.recipe import SETTINGS, recipe_in_python
from latentreward.reward.scoring.reward_model import RewardModel
from latentreward.reward.scoring.scoring_noise import timesteps_of

logger = logging.getLogger(__name__)

SIZE_SETTINGS = "data.size and data.resize, or the cache's images,"
"""Names of the settings that decide the size of images, for messages."""

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.vae import LatentEncoder


class RewardModule(PairModule):
    """Module that trains a reward model, any backbone with any head, with any preference loss.

    Args:
        backbone: Backbone that gives features; it owns the encoders and the noise process.
        head: Function that makes the head from the backbone's feature spec.
        loss: Preference loss.
        levels: Sampler of a training pair's timestep.
        ensemble_sigmas: Noise levels of an additional evaluation with the head's ensemble score; empty for none.
        options: See :class:`~latentreward.reward.modules.pairs.PairModule`.

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
        check_process(backbone)
        super().__init__(backbone.noise_process, backbone.source, loss, levels, **options)
        self.model = RewardModel(backbone, head(backbone.feature_spec))
        self.cross_spans_ranks = isinstance(self.model.head, EmbeddingHead)  # others read image and prompt together
        built = {} if backbone.built_by is None else backbone.built_by.init_args
        self.frozen_base.settings = unseen_settings("backbone", built, backbone.text_encoder)
        self._trained_sizes: ImageSizes | None = None
        if backbone.feature_spec.output is not None and not self.model.head.reads_output:
            name = type(self.model.head).__name__
            raise InputError(f"backbone.output_map is true, but {name} does not read the output map; set it to false")
        # Parameters that get no gradient would fail DDP, and taps that no head reads cost memory.
        backbone.drop_unread(self.model.head.reads_text, self.model.head.reads_temb)
        with suppress(InputError):  # raised when the model is saved instead
            self.model.recipe = recipe_in_python(backbone, self.model.head)
        for sigma in ensemble_sigmas:
            check_range("[0, 1]", ensemble_sigmas=sigma)
        check_once(ensemble_sigmas=ensemble_sigmas)
        with torch.device("cpu"):
            self.ensemble_timesteps = self.noise_process.timesteps_at(torch.tensor([float(s) for s in ensemble_sigmas]))
        if ensemble_sigmas:
            self._add_metrics("ensemble")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore how the training images were turned and resized, and whether they were edits."""
        super().on_load_checkpoint(checkpoint)
        self.model.exif = checked(ExifOrientation, checkpoint.get("exif"), "exif")
        self.model.edits = checked(bool | None, checkpoint.get("edits"), "edits")
        self._trained_sizes = sizes_of(checkpoint.get("image_sizes"))
        self.model.image_sizes = self._trained_sizes or self.model.image_sizes

    def on_fit_start(self) -> None:
        """Warn if scores are by default computed at noise levels that the training does not draw."""
        process, generator = self.noise_process, torch.Generator().manual_seed(0)
        # 64 draws from a generator of its own: the run's random numbers stay as they are.
        drawn = process.sigma(torch.cat([self.levels.draw(generator, process) for _ in range(64)]))
        scored = process.sigma(timesteps_of(self.model.noise, process))
        if scored.min() < drawn.min() - 0.1 or scored.max() > drawn.max() + 0.1:
            rank_zero_warn(
                f"model.levels draws noise levels {drawn.min():.2g} to {drawn.max():.2g}, but scores are by default at "
                f"{self.model.noise}; score with --noise.sigmas [{drawn.median():.2g}], or train at that level too"
            )

    def on_train_start(self) -> None:
        """Record how the training data turn and resize images, and whether they edit; warn if a resumed run changes it.

        A learning rate finder also sets the trainer's ``ckpt_path``, but goes back to step 0.
        """
        dataset = next(datasets_of(self.trainer.train_dataloader), None)
        exif, sizes = getattr(dataset, "exif", None), getattr(dataset, "image_sizes", None)
        sizes_record(sizes)  # raises if the rule cannot be saved
        if self.trainer.global_step:
            self._warn_if_other("resume", "exif", self.model.exif, exif, "the reader's exif")
            self._compare_data("resume", self.trainer.train_dataloader)
        self.model.exif = exif or self.model.exif
        if (edits := edits_of(dataset)) is not None:
            self.model.edits = edits
        self._trained_sizes = sizes or self._trained_sizes
        self.model.image_sizes = self._trained_sizes or self.model.image_sizes

    def on_validation_start(self) -> None:
        """Warn if a validation without training has images of other sizes than the training, or only one has edits."""
        if self.trainer.state.fn == "validate":
            self._compare_data("validate", self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Warn if the test data have images of other sizes than the training, or only one of them has edits."""
        self._compare_data("test", self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Warn if the data have images of other sizes than the training, or only one of them has edits."""
        self._compare_data("predict", self.trainer.predict_dataloaders)

    def _compare_data(self, command: str, loaders: Any) -> None:
        for dataset in datasets_of(loaders):
            sizes = getattr(dataset, "image_sizes", None)
            self._warn_if_other(command, "image sizes", self._trained_sizes, sizes, SIZE_SETTINGS)
            self._warn_if_other(command, "edits", self.model.edits, edits_of(dataset), "the reader's sources")

    def _warn_if_other(self, command: str, name: str, trained: Any, now: Any, setting: str) -> None:
        if None not in (trained, now) and trained != now and self.trainer.is_global_zero:
            logger.warning(
                f"{command}: the reward was trained with {name}: {trained}, the data now have {name}: {now}; set "
                f"{setting} to keep to the training"
            )

    def configure_model(self) -> None:
        """Shard weights over the ranks under Lightning's ``ModelParallelStrategy`` (FSDP2); see :mod:`.sharding`."""
        if self.device_mesh is not None:
            shard(self, self.model.backbone, self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is known of the training images and, if the run writes no config, how to build the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["exif"] = self.model.exif
        checkpoint["edits"] = self.model.edits
        checkpoint["image_sizes"] = sizes_record(self._trained_sizes)
        built = {"backbone": self.model.backbone.built_by, "head": self.model.head.built_by}
        saved = any(isinstance(callback, SaveConfigCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if not saved and None not in built.values():
            training = {"module": f"{type(self).__module__}.{type(self).__qualname__}"}
            checkpoint[SETTINGS] = {"training": training, **{part: asdict(made) for part, made in built.items()}}

    def summed(self, rewards: Tensor) -> Tensor:
        return self.model.head.total(rewards)

    def encode(self, batch: PreferenceBatch, draws: PairDraws, noise_per_image: bool = False) -> EncodedPairs:
        """See :meth:`PairModule.encode`; rows i and B + i of the result share a prompt and, by default, the noise."""
        latents = latents_of(self.model.backbone, batch, draws, self.posterior)
        sources = tuple(source.float() for source in batch.sources)  # for the reason of `latents_of`
        if batch.conditioning is None:
            conditioning, uncond = self.model.encode_prompts(batch.prompts, sources, batch.latent_space is not None)
        else:
            conditioning, uncond = self.model.take_prompts(batch.conditioning, batch.uncond)
            conditioning = replace(conditioning, source_latents=sources) if sources else conditioning
        noise = draws.normal("noise", latents.shape[1:], noise_per_image).to(latents.device)
        rows = [*range(len(batch))] * 2
        return EncodedPairs(latents.float(), noise, conditioning.select(rows), uncond and uncond.empty_for(rows))

    def score(
        self, batch: PreferenceBatch, encoded: EncodedPairs, timesteps: Tensor, with_cross: bool = False
    ) -> PairScores:
        """See :meth:`PairModule.score`; ``with_cross`` takes B forward passes with a head that has no embeddings."""
        noisy, cross = self.add_noise(encoded, timesteps), None
        if with_cross:
            rewards, cross = self._score_with_negatives(noisy, timesteps, encoded)
        else:
            rewards = self.model.head(self.model.read(noisy, timesteps, encoded.conditioning, encoded.uncond))
        # Losses and metrics compare scores in float32; bfloat16 of autocast has 8 bits.
        chosen, rejected = rewards.float().chunk(2)
        chosen_sigmas, rejected_sigmas = self.noise_process.sigma(timesteps).to(rewards.device).chunk(2)
        pairs = batch.label, batch.weight, chosen_sigmas, rejected_sigmas
        return PairScores(chosen, rejected, *pairs, cross, batch.targets)

    def _score_with_negatives(
        self, noisy: Tensor, timesteps: Tensor, encoded: EncodedPairs
    ) -> tuple[Tensor, CrossScores]:
        """Score noisy latents ``(2B, C, ...)`` with their own prompts, ``(2B,)``, and with those of the other pairs."""
        head = self.model.head
        if isinstance(head, EmbeddingHead):  # image and text are embedded apart: one pass
            features = self.model.read(noisy, timesteps, encoded.conditioning, encoded.uncond)
            image_embeds, text_embeds = head.embed(features)
            # Over the batches of all ranks, with gradient to the rank that owns a row.
            halves = [gather_with_grad(half) for half in image_embeds.chunk(2)]
            text = gather_with_grad(text_embeds.chunk(2)[0])
            cross = CrossScores(*(head.similarity_matrix(text, half) for half in halves))
            return head.similarity(image_embeds, text_embeds), cross
        rows = []  # one pass for each prompt; negatives and weights are of this rank only
        for prompt in range(len(noisy) // 2):
            conditioning = encoded.conditioning.select([prompt] * len(noisy))
            uncond = encoded.uncond and encoded.uncond.empty_for([prompt] * len(noisy))
            rewards = head(self.model.read(noisy, timesteps, conditioning, uncond)).float()
            if rewards.ndim > 1:
                raise InputError("in-batch negatives need a head with one output; set out_dim: 1 or mode: pair")
            rows.append(rewards)
        cross = CrossScores(*torch.stack(rows).chunk(2, dim=1))
        return torch.cat([cross.chosen.diagonal(), cross.rejected.diagonal()]), cross

    @property
    def latent_decoder(self) -> "LatentEncoder | None":
        return self.model.backbone.vae

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

    def evaluate_more(self, batch: PreferenceBatch, encoded: EncodedPairs) -> None:
        """See :meth:`PairModule.evaluate_more`; the ensemble over noise levels."""
        if len(self.ensemble_timesteps):
            self._update(["ensemble"], self._summed(self.score_ensemble(batch, encoded)))


def datasets_of(loaders: Any) -> Iterator[Any]:
    """Yield the data set of each loader that has one; a trainer holds one loader or a list."""
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        while isinstance(dataset, Subset):  # of random_split, in a script of one's own
            dataset = dataset.dataset
        if dataset is not None:
            yield dataset


def edits_of(dataset: Any) -> bool | None:
    """Tell whether the images of a data set are edits of pictures; None if it does not know."""
    taken = getattr(dataset, "taken", None)
    return None if taken is None else taken[0] > 0
