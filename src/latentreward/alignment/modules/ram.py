"""RAM (arXiv:2605.10759): regression of noised finished samples on a target that the reward has corrected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.losses.diffusion_dpo import denoising_error
from latentreward.alignment.losses.ram import RAMLoss
from latentreward.alignment.modules.forward_process import ForwardProcessModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import OLD, DecayRamp
from latentreward.alignment.rewards.base import RewardSource
from latentreward.core.contracts import RenoisedSamples
from latentreward.core.errors import check_at_least_one
from latentreward.core.seeding import pair_generator
from latentreward.diffusion import LevelSampler, PowerSigma


class RAMModule(ForwardProcessModule):
    """RAM (arXiv:2605.10759): learn from finished samples, noised again, for flows and for networks that predict noise.

    An older copy of the adapter samples. It follows the policy before each rollout. See
    :class:`~latentreward.alignment.RAMLoss`; logs ``train/loss`` and ``train/kl``, the mean squared difference from the
    reference.

    Args:
        policy: See :class:`ForwardProcessModule`; any family.
        reward: See :class:`ForwardProcessModule`; any reward.
        levels: Distribution of the noise levels to train at, whatever the sampler's steps are; None takes the density
            2σ (``PowerSigma`` with power 0.5).
        draws: Noise levels J of each sample, each with its own noise.
        old: How slowly the copy that samples follows the policy; None takes 0.01 · step, at most 0.9, as ports of
            the authors' code do.
        loss: See :class:`~latentreward.alignment.RAMLoss`.
        options: See :class:`ForwardProcessModule`.

    Raises:
        InputError: See :class:`ForwardProcessModule`; or if ``draws`` is below 1.
    """

    flows_only = False

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        levels: LevelSampler | None = None,
        draws: int = 8,
        old: DecayRamp | None = None,
        loss: RAMLoss | None = None,
        **options: Any,
    ) -> None:
        check_at_least_one(draws=draws)
        super().__init__(policy, reward, copies={OLD: old or DecayRamp(0.01, 0.9)}, steps=None, **options)
        self.levels, self.draws, self.loss = levels or PowerSigma(0.5), draws, loss or RAMLoss()
        self.row_passes = 4 + (self.loss.residual == "old")

    def trained_timesteps(self, key: str) -> tuple[Sequence[int], Tensor]:
        generator, process = pair_generator(self.seed, "trained levels", 0, key), self.policy.noise_process
        return range(self.draws), torch.cat([self.levels.draw(generator, process) for _ in range(self.draws)])

    def training_step(self, batch: RenoisedSamples, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        states = self.renoise(batch)
        reference = self.predict_under(None, batch, states)
        old = self.predict_under(OLD, batch, states) if self.loss.residual == "old" else None
        output = self.predict(batch, states)
        rows = self.loss(output, output if old is None else old, reference, states.target, batch.advantage)
        loss = self.guarded(rows.mean().float(), output, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/kl", denoising_error(output.detach(), reference).mean(), batch_size=len(batch))
        return loss
