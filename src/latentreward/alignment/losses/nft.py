r"""DiffusionNFT (arXiv:2509.16117): reinforcement learning on the forward process of a flow, without log-probabilities.

With clean latents x₀, noise ε, level σ, target velocity u = ε − x₀, the policy's velocity v, that of the older policy
which sampled x₀, and the optimality r of a sample from its advantage A,

.. math::
    r = \mathrm{clip}\bigl(\tfrac12 + \tfrac{A}{2c}, 0, 1\bigr), \qquad
    v^+ = \beta v + (1 - \beta) v_{\mathrm{old}}, \qquad v^- = (1 + \beta) v_{\mathrm{old}} - \beta v,

.. math::
    L = \frac{c}{\beta}\Bigl(r\,\frac{\langle (e^+)^2 \rangle}{w^+} + (1 - r)\,\frac{\langle (e^-)^2 \rangle}{w^-}\Bigr)
    + \lambda\,\langle (v - v_{\mathrm{ref}})^2 \rangle, \qquad
    e^\pm = \sigma (u - v^\pm), \qquad w^\pm = \max(\langle |e^\pm| \rangle, 10^{-5}).

⟨·⟩ is the mean over elements. This is the released code: errors of predicted clean latents, divided by their own mean
absolute value, which gets no gradient. The paper's form is r ⟨(u − v⁺)²⟩ + (1 − r) ⟨(u − v⁻)²⟩.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from latentreward.alignment.losses.dpo import denoising_error
from latentreward.core.contracts import to_float64, widest_float
from latentreward.core.errors import check_choices, check_range
from latentreward.reward.losses.base import SetLoss, per_row

LEAST_WEIGHT = 1e-5
"""Least mean absolute error that a squared error is divided by."""
Signs = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


def optimality(advantage: Tensor, max_advantage: float = 5.0, signs: Signs = "all") -> Tensor:
    """Compute the probability r in [0, 1] that a sample counts as good: ``(B,)`` float64, ½ for advantage 0.

    An advantage of c (``max_advantage``) or more gives 1, of −c or less 0. ``signs``: ``all`` uses A; ``positive_only``
    and ``negative_only`` set A of the other sign to 0; ``one_only`` uses 1 for positive A and 0 for others; ``binary``
    uses the sign of A.
    """
    values = to_float64(advantage)
    match signs:
        case "positive_only":
            values = values.clamp(min=0)
        case "negative_only":
            values = values.clamp(max=0)
        case "one_only":
            values = (values > 0).to(values)
        case "binary":
            values = values.sign()
    return (0.5 + values / (2 * max_advantage)).clamp(0, 1)


class NFTResult(NamedTuple):
    """Loss and its parts."""

    loss: Tensor  # ``policy + kl_weight · kl``, a scalar
    policy: Tensor  # Mean over samples of the two weighted errors, a scalar
    kl: Tensor  # Mean squared difference from the reference, a scalar; 0 without a reference
    optimality: Tensor  # ``(B,)`` r of each sample
    positive: Tensor  # ``(B,)`` weighted error of v⁺, before r and c / β
    negative: Tensor  # ``(B,)`` weighted error of v⁻, before 1 − r and c / β


class NFTLoss(SetLoss):
    """DiffusionNFT's loss on noised clean latents, computed in float64 (float32 on devices without it).

    Args:
        beta: β in (0, 1], share of the policy in v⁺ and v⁻. The released configs have 1, and 0.1 for text rendering and
            several rewards.
        kl_weight: λ, weight of the mean squared difference from the reference's velocity.
        max_advantage: c.
        signs: Use of positive and negative advantages; see :func:`optimality`.
        space: ``clean`` is the released code, ``velocity`` the paper's form, without c / β.

    Attributes:
        needs_reference: Whether :meth:`forward` needs ``reference``.
    """

    def __init__(
        self,
        beta: float = 1.0,
        kl_weight: float = 1e-4,
        max_advantage: float = 5.0,
        signs: Signs = "all",
        space: Literal["clean", "velocity"] = "clean",
    ) -> None:
        super().__init__()
        check_choices(NFTLoss, signs=signs, space=space)
        check_range("(0, 1]", "DiffusionNFT uses 1 and 0.1", beta=beta)
        check_range("[0, inf)", "0 leaves the reference out", kl_weight=kl_weight)
        check_range("(0, inf)", "DiffusionNFT uses 5", max_advantage=max_advantage)
        self.beta, self.kl_weight, self.max_advantage = beta, kl_weight, max_advantage
        self.signs, self.space, self.needs_reference = signs, space, kl_weight > 0

    def forward(
        self,
        velocity: Tensor,
        old: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        sigmas: Tensor,
        advantage: Tensor,
        reference: Tensor | None = None,
    ) -> NFTResult:
        """Compute the loss of B noised samples; velocities and targets are ``(B, C, ...)``, the others ``(B,)``.

        Args:
            velocity: The policy's velocity v.
            old: Velocity of the older policy, without gradient.
            target: ε − x₀; or two targets, that of v⁺ and that of v⁻, as in DiffusionOPSD.
            sigmas: Noise levels σ: by how much predicted clean latents fall for a rise of the velocity.
            advantage: Advantages of the samples.
            reference: Velocity of the reference, if :attr:`needs_reference`.
        """
        if self.needs_reference and reference is None:
            raise ValueError(f"kl_weight={self.kl_weight:g} needs the reference's velocity")
        wide = widest_float(velocity.device)
        ends = (target, target) if isinstance(target, Tensor) else target
        new, older, above, below = (tensor.to(wide) for tensor in (velocity, old.detach(), *ends))
        level = per_row(sigmas.to(new), new)
        # The older policy has no gradient: both mixtures move with the new one alone, in opposite directions.
        positive = self._error(level, above, self.beta * new + (1 - self.beta) * older)
        negative = self._error(level, below, (1 + self.beta) * older - self.beta * new)
        share = optimality(advantage, self.max_advantage, self.signs).to(new)
        # Undoes the division by 2c in r and the β in v⁺ − v⁻, as the released code does; DiffusionOPSD's leaves β.
        beta = self.beta if isinstance(target, Tensor) else 1.0
        factor = self.max_advantage / beta if self.space == "clean" else 1.0
        policy = factor * (share * positive + (1 - share) * negative).mean()
        drift = policy.new_zeros(()) if reference is None else denoising_error(velocity, reference.detach()).mean()
        loss = policy + self.kl_weight * drift if self.needs_reference else policy
        return NFTResult(loss.float(), policy.detach(), drift.detach(), share, positive.detach(), negative.detach())

    def _error(self, level: Tensor, target: Tensor, velocity: Tensor) -> Tensor:
        """Return the error ``(B,)`` of one of the two mixed velocities."""
        if self.space == "velocity":
            return (target - velocity).square().flatten(1).mean(dim=1)
        error = (level * (target - velocity)).flatten(1)
        return error.square().mean(dim=1) / self_normaliser(error)


def self_normaliser(error: Tensor) -> Tensor:
    """Compute the mean absolute error of each row of ``(B, E)``, at least :data:`LEAST_WEIGHT`, without gradient."""
    # A scale, not a target: with a gradient the loss would fall by larger errors of the divisor.
    return error.detach().abs().mean(dim=1).clamp(min=LEAST_WEIGHT)
