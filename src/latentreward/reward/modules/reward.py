"""Training of a latent reward model on preference pairs: noise, network, head and loss of a step, top to bottom."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, SaveConfigCallback
from torch import Generator, Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric

from latentreward.core.contracts import (
    Conditioning,
    CrossScores,
    FeatureSpec,
    PairScores,
    PreferenceBatch,
    TensorRecord,
)
from latentreward.core.errors import InputError, check_once, check_range, errors_at
from latentreward.core.running import pair_generator, phase, run_seed
from latentreward.diffusion import DiffusionBackbone, LevelSampler, NoiseProcess, TimestepGrid, UniformSigma
from latentreward.diffusion.backbones.base import LatentNetwork
from latentreward.diffusion.backbones.loading import check_process
from latentreward.reward.heads.base import EmbeddingHead, RewardHead
from latentreward.reward.heads.clip_projection import CLIPProjectionHead
from latentreward.reward.heads.gated_qformer import GatedQFormerHead
from latentreward.reward.losses.base import (
    PreferenceLoss,
    ThurstoneLoss,
    gather_pair_scores,
    gather_with_grad,
    mean_over_outputs,
)
from latentreward.reward.losses.lrm import LRMLoss
from latentreward.reward.metrics.calibration import PairCalibration
from latentreward.reward.metrics.pairwise import Equal, MeanLoss, MeanMargin, PairwiseAccuracy
from latentreward.reward.modules.pictures import TrainingPictures, record_building
from latentreward.reward.modules.sharding import shard
from latentreward.reward.modules.training import FrozenBase, OptimizerSteps, single_optimizer, unseen_settings
from latentreward.reward.scoring.recipe import recipe_in_python
from latentreward.reward.scoring.reward_model import RewardModel

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.vae import LatentEncoder

logger = logging.getLogger(__name__)


Posterior = Literal["sample", "mode"]
Side = Literal["chosen", "rejected"]


class PairDraws:
    """Random numbers for a batch of pairs that depend only on seed, epoch, purpose, pair and, if asked for, image.

    Results therefore depend neither on the number of processes or workers nor on where a run was resumed. Validation
    uses epoch 0.
    """

    def __init__(self, batch: PreferenceBatch, seed: int, epoch: int) -> None:
        self.batch, self.seed, self.epoch = batch, seed, epoch

    def _draw(self, purpose: str, per_image: bool, draw: Callable[[Generator], Tensor]) -> Tensor:
        batch, drawn = self.batch, []
        for keys in (batch.chosen_keys, batch.rejected_keys) if per_image else ([None] * len(batch),):
            names = zip(batch.pair_ids, keys, strict=True)
            generators = [pair_generator(self.seed, purpose, self.epoch, pair_id, key) for pair_id, key in names]
            drawn.append(torch.stack([draw(generator) for generator in generators]))
        return torch.cat([drawn[0], drawn[-1]])  # without ``per_image`` the one draw serves both sides

    def normal(self, purpose: str, shape: Sequence[int], per_image: bool) -> Tensor:
        """Draw standard normal numbers ``(2B, *shape)`` on the CPU, chosen images first.

        Numbers for different purposes are independent. With ``per_image`` the two images of a pair get different ones.
        """
        return self._draw(purpose, per_image, lambda generator: torch.randn(*shape, generator=generator))

    def timesteps(self, sampler: LevelSampler, process: NoiseProcess, per_image: bool) -> Tensor:
        """Draw timesteps ``(2B,)`` on the CPU, chosen images first; ``per_image`` as in :meth:`normal`."""
        return self._draw("timestep", per_image, lambda generator: sampler.draw(generator, process)).flatten()


@phase("encode")
def latents_of(
    network: LatentNetwork,
    batch: PreferenceBatch,
    draws: PairDraws,
    posterior: Posterior,
    sides: Sequence[Side] = ("chosen", "rejected"),
) -> Tensor:
    """Return the latents of ``sides`` of a batch, one side after the other: ``(len(sides) · B, C, ...)`` float32."""
    # In float32 before `cat`, which raises for float16 under bfloat16 autocast on a CPU.
    images = torch.cat([getattr(batch, side).float() for side in sides])
    kind = "backbone" if isinstance(network, DiffusionBackbone) else "policy"
    if batch.latent_space is not None:
        if batch.latent_space != network.latent_space:
            held = f"the data holds latents of the space [{batch.latent_space}]"
            remedy = f"encode the images with the {kind}'s own VAE"
            raise InputError(f"{held}, but the {kind} takes [{network.latent_space}]; {remedy}")
        return images
    if network.vae is None:
        raise InputError(f"the data holds pixels, but this {kind} has no VAE; load a full pipeline folder")
    noise = None
    if posterior == "sample":
        both = draws.normal("posterior", network.vae.latent_shape(images), per_image=True)
        chosen, rejected = both.chunk(2)
        noise = torch.cat([{"chosen": chosen, "rejected": rejected}[side] for side in sides]).to(images.device)
    return network.vae.encode(images, noise)


class ScoredPairs(NamedTuple):
    """Scores that a step of :class:`RewardModule` returns for callbacks; N = pairs × noise levels, all detached."""

    pair_ids: tuple[str, ...]  # N pair names
    chosen_keys: tuple[str, ...]  # N keys of the chosen images
    rejected_keys: tuple[str, ...]
    timesteps: Tensor  # ``(N,)`` timestep of the chosen image
    chosen: Tensor  # ``(N,)`` or ``(N, out_dim)`` rewards
    rejected: Tensor
    label: Tensor  # ``(N,)`` probability that chosen wins
    weight: Tensor  # ``(N,)`` weights, not normalised
    chosen_sigmas: Tensor  # ``(N,)`` noise levels in [0, 1] of the chosen images
    rejected_sigmas: Tensor


@dataclass(frozen=True)
class EncodedPairs(TensorRecord):
    """Encoded batch: latents and noise ``(2B, C, ...)``, chosen first, and conditioning of 2B rows."""

    latents: Tensor
    noise: Tensor
    conditioning: Conditioning
    uncond: Conditioning | None


class LevelMetrics(nn.Module):
    """Accuracy, margin, calibration, copies of the user's metrics, and under ``with_loss`` the loss, for one level."""

    def __init__(self, equal_scores: Equal, extra: Sequence[Metric], with_loss: bool = False) -> None:
        super().__init__()
        self.pair_metrics = nn.ModuleDict({"accuracy": PairwiseAccuracy(equal_scores), "margin": MeanMargin()})
        for metric in extra:
            name = type(metric).__name__
            if name in self.pair_metrics:
                raise InputError(f"metrics: {name} is given twice; derive a class of another name from it")
            self.pair_metrics[name] = metric.clone()
        self.calibration = PairCalibration()
        self.loss = MeanLoss() if with_loss else None

    def update(self, scores: PairScores, loss: PreferenceLoss) -> None:
        """Add pairs of one noise level, without those of weight 0 (unlabelled, or in place of unusable rows).

        ``loss`` predicts whether chosen wins.
        """
        counts = scores.weight > 0
        for metric in self.pair_metrics.values():
            metric.update(scores.chosen[counts], scores.rejected[counts], scores.label[counts])
        self.calibration.update(loss.win_probability(scores)[counts], scores.label[counts])

    def values(self) -> dict[str, Tensor]:
        """Compute each metric by name, and reset all metrics."""
        metrics = {**self.pair_metrics, "calibration": self.calibration}
        metrics |= {} if self.loss is None else {"loss": self.loss}
        values = {name: metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return values


class RewardModule(LightningModule):
    """Module that trains a reward model, any backbone with any head, with any preference loss.

    In training each pair gets a random noise level. Validation, test and prediction score each pair at every level of
    ``eval_timesteps`` and ``eval_sigmas``, with the same noise in each epoch. A derived class that scores pairs by
    another network has its own :meth:`encode` and :meth:`score`, and gives that network and no head.

    Args:
        backbone: Backbone that gives features; it owns the encoders and the noise process.
        head: Function that makes the head from the backbone's feature spec.
        loss: Preference loss.
        levels: Sampler of a training pair's timestep.
        noise_per_image: Whether the two images of a training pair get different noise (LRM) or the same (DiNa-LRM). In
            evaluation the two always get the same noise, because candidates that a reward compares during sampling
            share most of their noise.
        timestep_per_image: Whether the two images of a training pair get different timesteps.
        posterior: Whether the VAE's latents of pixels are a ``sample`` of its posterior, new for each image and epoch,
            or the posterior's ``mode``.
        eval_timesteps: Timesteps at which evaluation scores.
        eval_sigmas: Noise levels at which evaluation scores; for each, the nearest level of the process is used.
        ensemble_sigmas: Noise levels of an additional evaluation with the head's ensemble score; empty for none.
        equal_scores: Whether a pair with equal scores counts as ``wrong`` or as ``half`` right.
        metrics: Further torchmetrics metrics, whose ``update`` takes chosen rewards, rejected rewards and labels; each
            is logged like the built-in metrics, under its class name.
        decay_vectors: Whether vectors and scalars (biases, norms, temperature) get weight decay too, as in the released
            code of LRM and DiNa-LRM.
        optimizer: Optimiser of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped after each optimiser step; None keeps the rate constant.
        seed: Seed of all random numbers; None takes the run's ``seed_everything``.

    Attributes:
        lr: Learning rate that replaces the optimiser's own; None keeps the optimiser's. Lightning's learning rate
            finder sets this attribute.
        cross_spans_ranks: Whether scores with ``with_cross`` span the batches of all ranks, or only this rank's.
    """

    model: RewardModel

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead],
        loss: PreferenceLoss,
        levels: LevelSampler,
        noise_per_image: bool = False,
        timestep_per_image: bool = False,
        posterior: Posterior = "sample",
        eval_timesteps: Sequence[float] = (),
        eval_sigmas: Sequence[float] = (),
        ensemble_sigmas: Sequence[float] = (),
        equal_scores: Equal = "wrong",
        metrics: Sequence[Metric] = (),
        decay_vectors: bool = False,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if head is not None:
            check_process(backbone)
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, run_seed(seed)
        self.lr: float | None = None
        self.configured_lr: float | None = None
        self.frozen_base = FrozenBase(self, backbone.source, {})
        self.loss, self.levels, self.decay_vectors = loss, levels, decay_vectors
        self.noise_per_image, self.timestep_per_image, self.posterior = noise_per_image, timestep_per_image, posterior
        self.noise_process = process = backbone.noise_process
        if not (eval_timesteps or eval_sigmas):
            raise InputError("eval_timesteps and eval_sigmas are both empty; name at least one level to evaluate at")
        snapped = snap_timesteps(process, eval_timesteps)[:, None]
        at_sigmas = nearest_timesteps(process, eval_sigmas=eval_sigmas)[:, None]
        self.eval_levels = {f"t{t:g}": level for t, level in zip(eval_timesteps, snapped, strict=True)}
        self.eval_levels |= {f"sigma{s:g}": level for s, level in zip(eval_sigmas, at_sigmas, strict=True)}
        self.ensemble_timesteps = nearest_timesteps(process, ensemble_sigmas=ensemble_sigmas)
        self.cross_spans_ranks, self.pictures = True, TrainingPictures()
        self.metrics = nn.ModuleDict()
        for name in (*self.eval_levels, "all", *(["ensemble"] if ensemble_sigmas else [])):
            # In-batch negatives need a collective call, and in evaluation ranks may have different numbers of batches.
            with_loss = name in self.eval_levels and not loss.needs_cross_scores
            # ModuleDict takes no dots in its keys, and levels such as sigma0.2 have one.
            self.metrics[name.replace(".", "_")] = LevelMetrics(equal_scores, metrics, with_loss)
        if head is not None:
            self._take(backbone, head(backbone.feature_spec))

    def _take(self, backbone: DiffusionBackbone, head: RewardHead) -> None:
        self.model = RewardModel(backbone, head)
        self.cross_spans_ranks = isinstance(head, EmbeddingHead)  # others read image and prompt together
        built = {} if backbone.built_by is None else backbone.built_by.init_args
        self.frozen_base.settings = unseen_settings("backbone", built, backbone.text_encoder)
        if backbone.feature_spec.output is not None and not head.reads_output:
            name = type(head).__name__
            raise InputError(f"backbone.output_map is true, but {name} does not read the output map; set it to false")
        # Parameters that get no gradient would fail DDP, and taps that no head reads cost memory.
        backbone.drop_unread(head.reads_text, head.reads_temb)
        with suppress(InputError):  # raised when the model is saved instead
            self.model.recipe = recipe_in_python(backbone, head)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Return the ``loss`` of a batch at random noise levels, and as ``scored`` a :class:`ScoredPairs`.

        Logged loss, accuracy and margin are those of the batches of all ranks, which the loss gathers anyway. They are
        this rank's only if the loss has in-batch negatives and :attr:`cross_spans_ranks` is false.
        """
        draws = PairDraws(batch, self.seed, self.current_epoch)
        encoded = self.encode(batch, draws, self.noise_per_image)
        timesteps = draws.timesteps(self.levels, self.noise_process, self.timestep_per_image)
        scores = self.score(batch, encoded, timesteps, with_cross=self.loss.needs_cross_scores)
        # Weights are normalised over the batches of all ranks, as a single process with all pairs would.
        of_all = gather_pair_scores(scores) if scores.cross is None or self.cross_spans_ranks else scores
        loss = self.loss(of_all)
        size, decided = len(of_all.label), (of_all.label != 0.5) & (of_all.weight > 0)
        margin = mean_over_outputs(self.summed(of_all.margin.detach()))
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        # Dividing by a count on the device avoids a wait for the device; a batch of ties gives NaN.
        self.log("train/accuracy", ((margin > 0) & decided).sum() / decided.sum(), prog_bar=True, batch_size=size)
        self.log("train/margin", (margin * decided).sum() / decided.sum(), batch_size=size)
        return {"loss": loss, "scored": scored_pairs(batch, timesteps, self._summed(scores))}

    def encode(self, batch: PreferenceBatch, draws: PairDraws, noise_per_image: bool = False) -> EncodedPairs:
        """Encode images and prompts on the module's device, and draw the noise with ``draws``.

        Rows i and B + i of the result share a prompt and, by default, the noise.
        """
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

    def add_noise(self, encoded: EncodedPairs, timesteps: Tensor) -> Tensor:
        """Return noisy latents ``(2B, C, ...)`` at ``timesteps`` ``(2B,)``."""
        return self.noise_process.add_noise(encoded.latents, encoded.noise, timesteps)

    def score(
        self, batch: PreferenceBatch, encoded: EncodedPairs, timesteps: Tensor, with_cross: bool = False
    ) -> PairScores:
        """Score both images of each pair at ``timesteps`` ``(2B,)``.

        ``with_cross`` adds the scores of every image with every prompt: a collective call, which only training can make
        (in evaluation, ranks may have different numbers of batches).
        """
        noisy, cross = self.add_noise(encoded, timesteps), None
        if with_cross:
            rewards, cross = self._score_with_negatives(noisy, timesteps, encoded)
        else:
            rewards = self.model.head(self.model.backbone(noisy, timesteps, encoded.conditioning, encoded.uncond))
        # Losses and metrics compare scores in float32; bfloat16 of autocast has 8 bits.
        chosen, rejected = rewards.float().chunk(2)
        chosen_sigmas, rejected_sigmas = self.noise_process.sigma(timesteps).to(rewards.device).chunk(2)
        pairs = batch.label, batch.weight, chosen_sigmas, rejected_sigmas
        return PairScores(chosen, rejected, *pairs, cross, batch.targets)

    def _score_with_negatives(
        self, noisy: Tensor, timesteps: Tensor, encoded: EncodedPairs
    ) -> tuple[Tensor, CrossScores]:
        """Score noisy latents ``(2B, C, ...)`` with their own prompts, ``(2B,)``, and with those of the other pairs.

        A head without embeddings takes B forward passes.
        """
        head = self.model.head
        if isinstance(head, EmbeddingHead):  # image and text are embedded apart: one pass
            features = self.model.backbone(noisy, timesteps, encoded.conditioning, encoded.uncond)
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
            rewards = head(self.model.backbone(noisy, timesteps, conditioning, uncond)).float()
            if rewards.ndim > 1:
                raise InputError("in-batch negatives need a head with one output; set out_dim: 1 or mode: pair")
            rows.append(rewards)
        cross = CrossScores(*torch.stack(rows).chunk(2, dim=1))
        return torch.cat([cross.chosen.diagonal(), cross.rejected.diagonal()]), cross

    def summed(self, rewards: Tensor) -> Tensor:
        """Return one number per row: for a head with two outputs (two axes) their weighted sum, else the rewards."""
        return rewards if rewards.ndim == 1 else self.model.head.total(rewards)

    def _summed(self, scores: PairScores) -> PairScores:
        return replace(scores, chosen=self.summed(scores.chosen), rejected=self.summed(scores.rejected))

    def evaluation_step(self, batch: PreferenceBatch, stage: str | None = None) -> ScoredPairs:
        """Score at every evaluation level; under a ``stage`` (``val``, ``test``) also update and log its metrics.

        Random numbers are those of epoch 0, so that every evaluation uses the same noise.
        """
        encoded, levels = self.encode(batch, PairDraws(batch, self.seed, epoch=0)), []
        for name, timestep in self.eval_levels.items():
            timesteps = timestep.repeat(2 * len(batch))
            scores = self.score(batch, encoded, timesteps)
            summed = self._summed(scores)
            levels.append(scored_pairs(batch, timesteps, summed))
            if stage is None:
                continue
            metrics: Any = self.metrics[name.replace(".", "_")]
            for one in (metrics, self.metrics["all"]):
                one.update(summed, self.loss)
            if (mean_loss := metrics.loss) is not None:
                mean_loss.update(self.loss(scores), scores.weight)
        if stage is not None and len(self.ensemble_timesteps):
            self.metrics["ensemble"].update(self._summed(self.score_ensemble(batch, encoded)), self.loss)
        columns = zip(*levels, strict=True)
        return ScoredPairs(*(torch.cat(c) if isinstance(c[0], Tensor) else sum(c, ()) for c in columns))

    def score_ensemble(self, batch: PreferenceBatch, encoded: EncodedPairs) -> PairScores:
        """Score each pair with the head's ensemble over ``ensemble_sigmas``; the returned sigmas are their mean.

        One noise serves all levels; a stored reward draws another for each level, see :class:`ScoringNoise`.
        """
        levels = []
        for timestep in self.ensemble_timesteps:
            timesteps = timestep.repeat(2 * len(batch))
            noisy = self.add_noise(encoded, timesteps)
            levels.append(self.model.backbone(noisy, timesteps, encoded.conditioning, encoded.uncond))
        chosen, rejected = self.model.head.score_ensemble(levels).float().chunk(2)
        sigma = self.noise_process.sigma(self.ensemble_timesteps).mean().to(chosen.device)
        sigmas = sigma.repeat(len(batch))
        return PairScores(chosen, rejected, batch.label, batch.weight, sigmas, sigmas)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> ScoredPairs:
        return self.evaluation_step(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> ScoredPairs:
        return self.evaluation_step(batch, "test")

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> ScoredPairs:
        """Score at every evaluation level; pairs need no label."""
        return self.evaluation_step(batch)

    def _log_metrics(self, stage: str) -> None:
        for key, metrics in self.metrics.items():
            suffix = "" if key == "all" else f"_{key.replace('_', '.')}"
            for kind, value in metrics.values().items():
                shown = kind == "accuracy" and key == "all"
                self.log(f"{stage}/{kind}{suffix}", value, prog_bar=shown, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``, ``val/margin``, ``val/calibration`` and other metrics, over all levels and for each."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def setup(self, stage: str) -> None:
        """Check the trainer's precision, and share frozen weights; see :meth:`FrozenBase.prepare`."""
        self.frozen_base.prepare(self)

    def configure_model(self) -> None:
        """Shard weights over the ranks under Lightning's ``ModelParallelStrategy`` (FSDP2); see :mod:`.sharding`."""
        if self.device_mesh is not None:
            if not hasattr(self, "model"):
                raise InputError(f"trainer.strategy: {type(self).__name__} is not sharded; set ddp")
            shard(self, self.model.backbone, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Build one optimiser over the trainable parameters, and its schedule, stepped after each optimiser step."""
        self.configured_lr = self.lr
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler, self.decay_vectors, self.lr)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks that check optimiser steps, and compare the data with those of the training."""
        return [OptimizerSteps(), *([self.pictures] if hasattr(self, "model") else [])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the base, the training images and, if the run writes no config, how to build the model."""
        self.frozen_base.save(self, checkpoint, checkpoint["state_dict"])
        if hasattr(self, "model"):
            self.pictures.record(self.model, checkpoint)
            if not any(isinstance(callback, SaveConfigCallback) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
                record_building(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this base, fill in what it leaves out, and restore the training images."""
        self.frozen_base.check(self, checkpoint)
        if hasattr(self, "model"):
            self.pictures.restore(self.model, checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool = True, **kwargs: Any) -> Self:  # type: ignore[override]
        """Build a module from ``kwargs`` and load a checkpoint's weights; only tensors and plain values are read."""
        kwargs["_instantiator"] = None  # else Lightning takes the function that the checkpoint names
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)

    @property
    def latent_decoder(self) -> "LatentEncoder | None":
        """VAE that decodes latents, for callbacks; None without a VAE."""
        return self.model.backbone.vae


class DiNaLRMModule(RewardModule):
    """Reward module with DiNa-LRM's training (arXiv:2602.11146): a uniform noise level and one noise per pair.

    Evaluation also uses the head's ensemble over several noise levels.

    Args:
        backbone: Any backbone; a DiT in the paper.
        loss: None takes the paper's ``ThurstoneLoss()``.
        levels: Sampler of noise levels; None takes uniform noise levels.
        options: See :class:`RewardModule`.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead] = GatedQFormerHead,
        loss: PreferenceLoss | None = None,
        levels: LevelSampler | None = None,
        eval_sigmas: Sequence[float] = (0.2, 0.5, 0.8),
        ensemble_sigmas: Sequence[float] = (0.2, 0.5, 0.7),
        **options: Any,
    ) -> None:
        options |= {"eval_sigmas": eval_sigmas, "ensemble_sigmas": ensemble_sigmas}
        super().__init__(backbone, head, loss or ThurstoneLoss(), levels or UniformSigma(), **options)


class LRMModule(RewardModule):
    """Reward module with LRM's training (arXiv:2502.01051): a timestep of {1, 51, …, 951} per pair, noise per image.

    Args:
        backbone: Any backbone; a U-Net in the paper.
        loss: None takes ``LRMLoss(mode="pair")``.
        levels: Sampler of timesteps; None takes LRM's grid.
        options: See :class:`RewardModule`.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead] = CLIPProjectionHead,
        loss: PreferenceLoss | None = None,
        levels: LevelSampler | None = None,
        noise_per_image: bool = True,
        eval_timesteps: Sequence[float] = (1, 251, 501, 801),
        **options: Any,
    ) -> None:
        options |= {"noise_per_image": noise_per_image, "eval_timesteps": eval_timesteps}
        super().__init__(backbone, head, loss or LRMLoss(), levels or TimestepGrid(), **options)


def snap_timesteps(process: NoiseProcess, eval_timesteps: Sequence[float]) -> Tensor:
    """Return the timesteps of ``process`` nearest to ``eval_timesteps``."""
    check_once(eval_timesteps=eval_timesteps)
    with torch.device("cpu"), errors_at(f"eval_timesteps={list(eval_timesteps)}: "):  # where the process has its tables
        timesteps = torch.tensor([float(timestep) for timestep in eval_timesteps])
        process.sigma(timesteps)
        return process.snap(timesteps)


def nearest_timesteps(process: NoiseProcess, **sigmas: Sequence[float]) -> Tensor:
    """Return the timesteps of ``process`` nearest to a setting's noise levels; each lies in [0, 1], and stands once."""
    ((name, levels),) = sigmas.items()
    check_once(**sigmas)
    for sigma in levels:
        check_range("[0, 1]", **{name: sigma})
    with torch.device("cpu"):  # where the process has its tables, also if the module is built under another device
        return process.timesteps_at(torch.tensor([float(sigma) for sigma in levels]))


def scored_pairs(batch: PreferenceBatch, timesteps: Tensor, scores: PairScores) -> ScoredPairs:
    """Make the detached record of one level's scores, for callbacks; ``timesteps`` ``(2B,)``."""
    names = batch.pair_ids, batch.chosen_keys, batch.rejected_keys
    pairs = scores.label, scores.weight, scores.chosen_sigmas, scores.rejected_sigmas
    return ScoredPairs(*names, timesteps[: len(batch)], scores.chosen.detach(), scores.rejected.detach(), *pairs)
