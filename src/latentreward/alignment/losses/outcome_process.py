r"""Clipped policy loss with two advantages: of the finished sample, and of the step (Euphonium, arXiv:2602.04928).

.. math:: l = \frac1B \sum_i w_o\, l_{\mathrm{PPO}}(\rho_i, A_i) + w_p\, l_{\mathrm{PPO}}(\rho_i, A_{i,t})
    + \beta\,\frac1B \sum_i \mathrm{KL}_i, \qquad
    l_{\mathrm{PPO}}(\rho, A) = \max\bigl(-A \rho,\; -A\,\mathrm{clamp}(\rho, 1 \pm \epsilon)\bigr)

Each term is clipped separately. If the two advantages differ in sign, this is not PPO's loss of their sum.
"""

from torch import Tensor

from latentreward.alignment.losses.clipped_policy import ClippedPolicyLoss, ClippedPolicyResult, clipped_objective
from latentreward.core.errors import InputError, check_range


class OutcomeProcessLoss(ClippedPolicyLoss):
    """GRPO's clipped objective of two advantages.

    Args:
        clip_range: ε, see :class:`ClippedPolicyLoss`; for both terms.
        kl_weight: β; 0 leaves the KL term out.
        max_advantage: Bound of both advantages; None sets no bound.
        outcome_weight: w_o, at least 0; 1 in Euphonium.
        process_weight: w_p, at least 0; 1 in Euphonium.

    Raises:
        InputError: If an argument is out of range, or both weights are 0.
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
        """Compute the loss of B sampled steps.

        Args:
            log_prob: ``(B,)`` log-probabilities of the steps under the present policy.
            old_log_prob: ``(B,)`` log-probabilities of the steps under the policy that sampled them, without guidance.
            outcome: ``(B,)`` advantages of the steps' finished samples.
            process: ``(B,)`` advantages of the steps' own scores.
            kl: ``(B,)`` KL divergence from the reference; must be given if :attr:`needs_reference`.

        Returns:
            The loss and its parts; ``policy`` is the weighted sum of the two clipped terms.

        Raises:
            ValueError: If ``kl`` is missing.
        """

        def both(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
            """Add the process' clipped term to the outcome's."""
            rows, ratio, clipped = clipped_objective(log_ratio, advantage, clip_range)
            # Clipped by itself: where the two advantages differ in sign, PPO of their sum would clip other steps.
            steps, _, _ = clipped_objective(log_ratio, self.bounded(process), clip_range)
            return self.outcome_weight * rows + self.process_weight * steps, ratio, clipped

        return super().forward(log_prob, old_log_prob, outcome, kl, objective=both)
