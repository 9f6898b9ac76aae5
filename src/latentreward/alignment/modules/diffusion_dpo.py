"""Diffusion-DPO (arXiv:2311.12908): align a policy with pairs of finished images, without reward or sampling."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from latentreward.alignment.losses.dpo import LinearDPO, denoising_error, implicit_rewards
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import AVERAGE, DecayRamp, MovingCopy
from latentreward.alignment.rollout.trajectories import PriorNoise
from latentreward.core.contracts import PairScores, PreferenceBatch
from latentreward.core.errors import InputError, check_range, errors_at, quoted
from latentreward.diffusion import LevelSampler, TimestepGrid
from latentreward.reward import (
    BradleyTerryLoss,
    MeanLoss,
    MeanMargin,
    PairwiseAccuracy,
    gather_pair_scores,
    gather_with_grad,
    weighted_mean,
)
from latentreward.reward.modules.reward import EncodedPairs, PairDraws, latents_of, snap_timesteps


class ImplicitPairs(NamedTuple):
    """Implicit rewards of pairs at one noise level."""

    scores: PairScores  # Implicit rewards of chosen and rejected images; ties have weight 0
    drift: Tensor  # ``(2B,)`` mean squared difference of the predictions of policy and reference, chosen images first
    losses: Tensor | None = None  # ``(B,)`` losses of Linear-DPO; None for the sigmoid loss, which the scores determine


class DiffusionDPOModule(AlignmentModule):
    """Diffusion-DPO for any policy: noise, v and velocity prediction, U-Net and DiT.

    Trains on pixels or cached latents. The two images of a pair get the same timestep and the same noise, unless
    ``prior_noise`` gives each its own. The reference is the same network without its adapter.

    As in the paper, ties (label ½) have no part in loss and metrics, nor have pairs of weight 0 (unlabelled pairs, and
    rows kept in place of unusable ones). A soft label y with margin m gives −y log σ(m) − (1 − y) log σ(−m).

    Args:
        beta: β of :func:`~latentreward.alignment.implicit_rewards`.
        levels: Sampler of a training pair's timestep; None samples uniformly from 0, 1, …, 999, as the released code
            does. Flow matching uses the nearest timestep of its table.
        eval_timesteps: Timesteps at which validation compares every pair, with the same noise in each epoch.
        linear: Linear-DPO's loss in place of the sigmoid; see :mod:`latentreward.alignment.losses.dpo`.
        reference: How slowly a moving average of the policy follows it, one move at each optimiser step. The average
            is then the reference, as in Linear-DPO; None keeps the network without its adapter.
        prior_noise: Add to each image the noise from which ``latentreward generate`` made it, as PNAPO
            (arXiv:2605.09433) does, instead of a random one. For flows, and pictures of nearly this policy.
        options: See :class:`AlignmentModule`. Training uses no classifier-free guidance, as in the paper.
    """

    def __init__(
        self,
        policy: PolicySource,
        beta: float = 5000.0,
        levels: LevelSampler | None = None,
        eval_timesteps: Sequence[float] = (101, 301, 501, 701, 901),
        linear: LinearDPO | None = None,
        reference: DecayRamp | None = None,
        prior_noise: bool = False,
        **options: Any,
    ) -> None:
        check_range("(0, inf)", "the paper uses 2000 (SD1.5) and 5000 (SDXL)", beta=beta)
        if not eval_timesteps:
            raise InputError("eval_timesteps is empty; name at least one timestep to validate at")
        if prior_noise and not (family := policy.resolve_family()).flow:
            raise InputError(f"prior_noise is for flows, and {family.title} is none; leave it out")
        super().__init__(policy, None, **options)
        self.beta, self.prior_noise = beta, prior_noise
        self.levels = levels or TimestepGrid(0, 999, 1)
        self.loss = BradleyTerryLoss()
        self.eval_timesteps = snap_timesteps(self.policy.noise_process, eval_timesteps)
        self.val_accuracy, self.val_margin = PairwiseAccuracy("half"), MeanMargin()
        self.val_loss = MeanLoss()
        self.linear = linear
        self.average = None if reference is None else MovingCopy(self.policy, AVERAGE, reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.check(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the moving average follow the policy, before the policy's own step, as the released code does."""
        if self.average is not None:
            self.average.follow(self.trainer.global_step)

    def encode(self, batch: PreferenceBatch, draws: PairDraws) -> EncodedPairs:
        """Encode images and prompts, and draw the noise: the same for both images of a pair, or each one's own."""
        latents = latents_of(self.policy, batch, draws, "sample")
        conditioning = self.policy.conditioning_of(batch)
        shape = tuple(latents.shape[1:])
        noise = prior_noises(batch, shape) if self.prior_noise else draws.normal("noise", shape, per_image=False)
        return EncodedPairs(latents, noise.to(latents.device), conditioning.select([*range(len(batch))] * 2), None)

    def compare(self, batch: PreferenceBatch, encoded: EncodedPairs, timesteps: Tensor) -> ImplicitPairs:
        """Compute the implicit rewards of an encoded batch at ``timesteps`` ``(2B,)``, chosen images first."""
        process, latents, noise = self.policy.noise_process, encoded.latents, encoded.noise
        conditioning = encoded.conditioning
        noisy = process.add_noise(latents, noise, timesteps)
        target = process.target(latents, noise, timesteps)
        with torch.no_grad(), self.policy.adapters.use(None if self.average is None else self.average.name):
            reference = self.policy.predict(noisy, timesteps, conditioning, self.guidance_scale)
        prediction = self.policy.predict(noisy, timesteps, conditioning, self.guidance_scale)
        losses = None
        if self.linear is not None:
            losses = self.linear(prediction, reference, target, self.beta, batch.label).per_pair
        chosen, rejected = implicit_rewards(prediction, reference, target, self.beta).chunk(2)
        sigmas = process.sigma(timesteps).to(chosen.device).chunk(2)
        # As in the paper and its code, ties take no part.
        weight = batch.weight * (batch.label != 0.5)
        scores = PairScores(chosen, rejected, batch.label, weight, *sigmas)
        return ImplicitPairs(scores, denoising_error(prediction.detach(), reference), losses)

    def loss_of(self, pairs: ImplicitPairs) -> tuple[Tensor, PairScores]:
        """Return the loss over the pairs of all ranks, and their scores."""
        scores = gather_pair_scores(pairs.scores)
        if pairs.losses is None:
            return self.loss(scores), scores
        return weighted_mean(gather_with_grad(pairs.losses), scores.weight), scores

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        draws = PairDraws(batch, self.seed, self.current_epoch)
        encoded = self.encode(batch, draws)
        # The same timestep and noise for both images: their errors then differ by the images alone.
        timesteps = draws.timesteps(self.levels, self.policy.noise_process, per_image=False).to(encoded.latents.device)
        pairs = self.compare(batch, encoded, timesteps)
        loss, scores = self.loss_of(pairs)
        size, weight = len(scores.label), scores.weight
        margin = scores.margin.detach()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        accuracy = weighted_mean(self.val_accuracy.credit(margin), weight)
        self.log("train/implicit_accuracy", accuracy, prog_bar=True, batch_size=size)
        self.log("train/margin", weighted_mean(margin, weight), batch_size=size)
        for side in ("chosen", "rejected"):  # both fall if the policy unlearns to denoise
            rewards = getattr(scores, side).detach().float()
            self.log(f"train/{side}_reward", weighted_mean(rewards, weight), batch_size=size)
        self.log("train/drift", pairs.drift.mean(), batch_size=len(batch))
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        encoded = self.encode(batch, PairDraws(batch, self.seed, epoch=0))
        for timestep in self.eval_timesteps.to(encoded.latents.device):
            pairs = self.compare(batch, encoded, timestep.repeat(2 * len(batch)))
            scores, counts = pairs.scores, pairs.scores.weight > 0
            for metric in (self.val_accuracy, self.val_margin):
                metric.update(scores.chosen[counts], scores.rejected[counts], scores.label[counts])
            loss = self.loss(scores) if pairs.losses is None else weighted_mean(pairs.losses, scores.weight)
            self.val_loss.update(loss, scores.weight)
            self.log("val/drift", pairs.drift.mean(), batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        metrics = {"implicit_accuracy": self.val_accuracy, "margin": self.val_margin, "loss": self.val_loss}
        for name, metric in metrics.items():
            self.log(f"val/{name}", metric.compute(), prog_bar=name == "implicit_accuracy")
            metric.reset()


def prior_noises(batch: PreferenceBatch, shape: tuple[int, ...]) -> Tensor:
    """Draw again the noises ``(2B, *shape)`` of the images, chosen first, on the CPU; zeros for pairs of weight 0."""
    names = batch.chosen_noise + batch.rejected_noise or (None,) * 2 * len(batch)
    weights = 2 * batch.weight.tolist() if None in names else []  # of a device, which is waited for only then
    drawn = []
    for row, name in enumerate(names):
        with errors_at(f"prior_noise: pair {quoted(batch.pair_ids[row % len(batch)])}: "):
            if name is None and weights[row]:
                raise InputError("it has no noise_a and noise_b, as latentreward generate writes; or leave it out")
            noise = None if name is None else PriorNoise.parse(name)
        drawn.append(torch.zeros(shape) if noise is None else noise.draw())
    return torch.stack(drawn)
