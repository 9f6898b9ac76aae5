"""RAM (arXiv:2605.10759): regression of noised finished samples on a target that the reward has corrected."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from latentreward.alignment.losses.dpo import denoising_error
from latentreward.alignment.losses.matching import squared_error
from latentreward.alignment.modules.forward_process import ForwardProcessModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.moving_average import OLD, DecayRamp
from latentreward.alignment.rewards.base import RewardSource
from latentreward.core.contracts import RenoisedSamples
from latentreward.core.errors import check_at_least_one, check_choices, check_range
from latentreward.core.running import pair_generator
from latentreward.diffusion import LevelSampler, PowerSigma
from latentreward.reward.losses.base import SetLoss, per_row


def directed_target(base: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """Return base + weight·direction, without gradient; tensors ``(B, C, ...)``, ``weight`` ``(B,)``."""
    wide = torch.promote_types(base.dtype, torch.float32)  # m·A would lose digits in bfloat16, and overflow in float16
    return (base + per_row(weight.to(base.device, wide), base) * direction).detach()


class RAMLoss(SetLoss):
    r"""Reinforce adjoint matching (arXiv:2605.10759, eq. 17): regression on a target that the reward has corrected.

    .. math:: y = \mathrm{sg}[f_{\mathrm{ref}} + m\,A\,(u - f_{\mathrm{old}})]

    u is the true target of the noisy state (the velocity ε − x₀ of a flow, or the noise), A the advantage of x₀. With
    A = 0 the policy is pulled to the reference. The gradient is m times that of the advantage-weighted denoising error,
    plus such a pull with weight 1.

    Args:
        multiplier: m, at least 0. An advantage has no unit (it is divided by the spread of rewards), and so has m. The
            lower m is, the nearer the policy stays to the reference; Adam's steps do not grow with m. Ports of
            the authors' code have 100 for GenEval and OCR, 1000 for PickScore.
        residual: Prediction that the true target is compared with: ``old``, as released, or ``policy``, as in the
            paper, which saves a forward pass.

    Note:
        The released code was not at hand; ``old`` and the authors' m are second-hand.
    """

    def __init__(self, multiplier: float = 10.0, residual: Literal["old", "policy"] = "old") -> None:
        super().__init__()
        check_choices(RAMLoss, residual=residual)
        check_range("[0, inf)", "RAM uses 100 and 1000", multiplier=multiplier)
        self.multiplier, self.residual = multiplier, residual

    def target(self, reference: Tensor, old: Tensor, true: Tensor, advantage: Tensor) -> Tensor:
        """Compute y ``(B, C, ...)``; see :meth:`forward`."""
        return directed_target(reference, true - old, self.multiplier * advantage)

    def forward(self, output: Tensor, old: Tensor, reference: Tensor, true: Tensor, advantage: Tensor) -> Tensor:
        """Compute the loss ``(B,)``, float64, of outputs and true targets u ``(B, C, ...)`` and advantages A ``(B,)``.

        The older policy's output may be the policy's own. The size of the loss, of order m², tells nothing.
        """
        return squared_error(output, self.target(reference, old, true, advantage))


class RAMModule(ForwardProcessModule):
    """RAM (arXiv:2605.10759): learn from finished samples, noised again, for flows and for networks that predict noise.

    An older copy of the adapter samples. It follows the policy before each rollout. Logs ``train/loss`` and
    ``train/kl``, the mean squared difference from the reference.

    Args:
        levels: Distribution of the noise levels to train at, whatever the sampler's steps are; None takes the density
            2σ (``PowerSigma`` with power 0.5).
        draws: Noise levels J of each sample, each with its own noise.
        old: How slowly the copy that samples follows the policy; None takes 0.01 · step, at most 0.9, as ports of
            the authors' code do.
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

    def trained_timesteps(self, key: str) -> tuple[Sequence[int], Tensor]:
        generator, process = pair_generator(self.seed, "trained levels", 0, key), self.policy.noise_process
        return range(self.draws), torch.cat([self.levels.draw(generator, process) for _ in range(self.draws)])

    def training_step(self, batch: RenoisedSamples, batch_idx: int) -> Tensor:
        states = self.renoise(batch)
        reference = self.predict_under(None, batch, states)
        old = self.predict_under(OLD, batch, states) if self.loss.residual == "old" else None
        output = self.predict(batch, states)
        rows = self.loss(output, output if old is None else old, reference, states.target, batch.advantage)
        loss = self.guarded(rows.mean().float(), output, reference)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/kl", denoising_error(output.detach(), reference).mean(), batch_size=len(batch))
        return loss
