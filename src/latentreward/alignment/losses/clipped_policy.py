r"""Clipped policy-gradient loss on sampled steps, with a KL penalty towards the reference (GRPO for diffusion).

.. math:: l = \frac1B \sum_i \max\bigl(-A_i \rho_i,\; -A_i\,\mathrm{clamp}(\rho_i, 1 \pm \epsilon)\bigr)
    + \beta\,\frac1B \sum_i \mathrm{KL}_i, \qquad
    \rho = \frac{p_\theta(x_{t-1} \mid x_t, c)}{p_{\mathrm{old}}(x_{t-1} \mid x_t, c)}

This is PPO's objective (arXiv:1707.06347, eq. 7) with group-relative advantages (arXiv:2402.03300), applied to the
steps of a sampler as in Flow-GRPO (arXiv:2505.05470, eq. 5) and DanceGRPO (arXiv:2505.07818).

With the advantages of the finished sample and of the step (Euphonium, arXiv:2602.04928) there are two such terms, with
weights and each clipped by itself. Where the two advantages differ in sign, this is not PPO's loss of their sum.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.reward.losses.base import SetLoss


def gaussian_step_kl(mean: Tensor, ref_mean: Tensor, spread: Tensor) -> Tensor:
    """Compute the KL divergence (μ − μ_ref)² / 2s² of two Gaussian steps, averaged over elements: ``(B,)`` float32.

    Means are ``(B, C, ...)``; ``spread`` ``(B,)`` is the positive s, :attr:`latentreward.alignment.Transition.spread`.
    """
    squares = (mean.float() - ref_mean.float()).square().flatten(1).mean(dim=1)
    return squares / (2 * spread.to(squares).square())


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute PPO's objective max(−Aρ, −A clamp(ρ, 1 ± ε)) of each step from log ρ ``(B,)`` and A ``(B,)``.

    Also returns the ratios ρ ``(B,)``, and whether each lies outside 1 ± ε ``(B,)``.
    """
    # The pessimistic one of the two: a ratio that moved the wrong way keeps its gradient beyond the range.
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * bounded), ratio, ratio != bounded


Objective = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""Function with the arguments and results of :func:`clipped_objective`."""


class ClippedPolicyResult(NamedTuple):
    """Loss and its parts; all scalars, float32."""

    loss: Tensor  # ``policy + kl_weight · kl``
    policy: Tensor  # The clipped policy term
    kl: Tensor  # Mean KL divergence from the reference; 0 if ``kl`` was not given
    clipped: Tensor  # Share of steps whose ratio lies outside 1 ± ε
    ratio: Tensor  # Mean ratio


class ClippedPolicyLoss(SetLoss):
    """GRPO's clipped objective.

    It is computed in float64, because the two densities in a ratio differ by some 1e-4 only.

    Args:
        clip_range: ε, in (0, 1). Ratios stay close to 1 because log-probabilities are means over elements; Flow-GRPO
            takes 1e-4 (SD3.5-M, released configuration).
        kl_weight: β; 0 leaves the KL term out. Flow-GRPO takes 0.04 and 0.01.
        max_advantage: Bound: advantages are clamped to [−``max_advantage``, ``max_advantage``]; None sets no bound.
        step_weight: Weight w of each step's policy term, times 2.25 (TempFlow-GRPO, arXiv:2508.04324): the ``noise`` of
            the step, s√Δ (the paper); its ``spread`` s (recommended by the authors, with ``kl_weight`` ten times as
            large); or ``none``. The KL divergence is then that of a Gaussian of the same w.

    Attributes:
        needs_reference: Whether :meth:`forward` needs ``kl``.
        takes_process: Whether :meth:`forward` takes the advantage of the step beside that of the finished sample.
    """

    takes_process = False

    def __init__(
        self,
        clip_range: float = 1e-4,
        kl_weight: float = 0.0,
        max_advantage: float | None = 5.0,
        step_weight: Literal["none", "noise", "spread"] = "none",
    ) -> None:
        super().__init__()
        check_choices(ClippedPolicyLoss, step_weight=step_weight)
        check_range("(0, 1)", "Flow-GRPO uses 1e-4", clip_range=clip_range)
        check_range("[0, inf)", "0 leaves the reference out", kl_weight=kl_weight)
        check_range("(0, inf]", "Flow-GRPO uses 5, null sets no bound", max_advantage=max_advantage)
        self.clip_range, self.kl_weight, self.max_advantage = clip_range, kl_weight, max_advantage
        self.step_weight, self.needs_reference = step_weight, kl_weight > 0

    def bounded(self, advantage: Tensor) -> Tensor:
        """Clamp advantages to [−``max_advantage``, ``max_advantage``]; float64."""
        bound = self.max_advantage
        return to_float64(advantage) if bound is None else to_float64(advantage).clamp(-bound, bound)

    def step_weights(self, std: Tensor, spread: Tensor) -> Tensor | None:
        """Return the weight w of each step from its ``std`` and ``spread``; None if all steps have weight 1."""
        return {"none": None, "noise": std, "spread": spread}[self.step_weight]

    def forward(
        self,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        kl: Tensor | None = None,
        weights: Tensor | None = None,
        objective: Objective = clipped_objective,
        kl_weights: Tensor | None = None,
    ) -> ClippedPolicyResult:
        """Compute the loss of B sampled steps; all tensors are ``(B,)``.

        Args:
            log_prob: Log-probabilities of the steps under the present policy.
            old_log_prob: Log-probabilities of the steps under the policy that sampled them.
            advantage: Advantages of the steps.
            kl: KL divergence from the reference, e.g. of :func:`gaussian_step_kl`, if :attr:`needs_reference`.
            weights: :meth:`step_weights`.
            objective: Objective in place of the clipped one; see :class:`~latentreward.alignment.RatioRule`.
            kl_weights: Factors of the steps' KL divergences, such as :func:`held_weights`; None for 1.
        """
        if self.needs_reference and kl is None:
            raise ValueError(f"kl_weight={self.kl_weight:g} needs kl")
        log_prob, old_log_prob = to_float64(log_prob), to_float64(old_log_prob)
        kl, weights, kl_weights = (None if part is None else to_float64(part) for part in (kl, weights, kl_weights))
        rows, ratio, clipped = objective(log_prob - old_log_prob, self.bounded(advantage), self.clip_range)
        # The weight multiplies the policy's term alone, and has the factor 2.25, as in TempFlow-GRPO's released code.
        policy = (rows if weights is None else 2.25 * weights * rows).mean()
        divergence = policy.new_zeros(())
        if kl is not None:
            divergence = (kl if kl_weights is None else kl_weights * kl).mean()
        loss = policy + self.kl_weight * divergence if self.needs_reference else policy
        parts = (policy, divergence, clipped.double().mean(), ratio.mean())
        return ClippedPolicyResult(loss.float(), *(part.detach().float() for part in parts))


def held_weights(held: Tensor, every: Tensor | None = None) -> Tensor:
    """Return factors ``(B,)`` with which the mean over all rows is the mean over the held rows; 0 if no row is held.

    ``held`` ``(B,)`` bool tells which rows get the KL term. With ``every`` ``(ranks, B)``, those of all ranks, the mean
    of the ranks' losses is the mean over the held rows of all ranks.
    """
    share = (held if every is None else every).float().mean()
    return held / share.where(share > 0, 1.0)


class OutcomeProcessLoss(ClippedPolicyLoss):
    """GRPO's clipped objective of two advantages.

    Args:
        clip_range: ε, see :class:`ClippedPolicyLoss`; for both terms.
        kl_weight: β; 0 leaves the KL term out.
        max_advantage: Bound of both advantages; None sets no bound.
        outcome_weight: w_o, at least 0; 1 in Euphonium.
        process_weight: w_p, at least 0; 1 in Euphonium.
    """

    takes_process = True

    def __init__(
        self,
        clip_range: float = 1e-4,
        kl_weight: float = 0.0,
        max_advantage: float | None = 5.0,
        outcome_weight: float = 1.0,
        process_weight: float = 1.0,
    ) -> None:
        super().__init__(clip_range, kl_weight, max_advantage)
        check_range("[0, inf)", outcome_weight=outcome_weight, process_weight=process_weight)
        if not (outcome_weight or process_weight):
            raise InputError("outcome_weight=0 and process_weight=0 leave no term; raise one of them")
        self.outcome_weight, self.process_weight = outcome_weight, process_weight

    def forward(  # type: ignore[override]  # called where `process` is known
        self, log_prob: Tensor, old_log_prob: Tensor, outcome: Tensor, process: Tensor, kl: Tensor | None = None
    ) -> ClippedPolicyResult:
        """Compute the loss from advantages of the finished samples and of the steps' own scores, all ``(B,)``."""

        def both(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
            """Add the process' clipped term to the outcome's."""
            rows, ratio, clipped = clipped_objective(log_ratio, advantage, clip_range)
            # Clipped by itself: where the two advantages differ in sign, PPO of their sum would clip other steps.
            steps, _, _ = clipped_objective(log_ratio, self.bounded(process), clip_range)
            return self.outcome_weight * rows + self.process_weight * steps, ratio, clipped

        return super().forward(log_prob, old_log_prob, outcome, kl, objective=both)
