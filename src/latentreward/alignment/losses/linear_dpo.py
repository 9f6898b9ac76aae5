r"""Linear-DPO (arXiv:2605.21123): Diffusion-DPO whose gradient does not vanish for correctly ranked pairs.

With the denoising errors e of the two images, Δ = e_w − e_l under the policy, and the margin m of implicit rewards
(:mod:`latentreward.alignment.losses.diffusion_dpo`),

.. math:: L = u\,\Delta, \qquad u = \mathrm{clip}\bigl(\tfrac12 - 0.4\,m,\; \eta,\; 1 - \eta\bigr).

u is detached. Plain DPO has σ(−m) β / 2 in place of u, which falls exponentially as m grows; u lacks the factor β / 2,
so learning rates differ.
"""

from typing import NamedTuple

from torch import Tensor

from latentreward.alignment.losses.diffusion_dpo import denoising_error, implicit_rewards
from latentreward.core.errors import check_range
from latentreward.reward.losses.base import SetLoss


class LinearDPOResult(NamedTuple):
    """Result for B pairs.

    Attributes:
        per_pair: ``(B,)`` loss of each pair.
        weight: ``(B,)`` u, without gradient; with labels y it is y u(m) − (1 − y) u(−m).
        margin: ``(B,)`` margin m, without gradient.
    """

    per_pair: Tensor
    weight: Tensor
    margin: Tensor


class LinearDPO(SetLoss):
    """Linear-DPO's loss: denoising errors weighted by a clipped linear function of the margin.

    Args:
        eta: η in [0, ½): weights of pairs are clipped to [η, 1 − η]. The released scripts have 1e-3 (SD1.5), 0 (SDXL)
            and 0.01.

    Raises:
        InputError: If ``eta`` is out of range.
    """

    def __init__(self, eta: float = 1e-3) -> None:
        super().__init__()
        check_range("[0, 0.5)", "Linear-DPO uses 1e-3 for SD1.5", eta=eta)
        self.eta = eta

    def forward(
        self, prediction: Tensor, reference: Tensor, target: Tensor, beta: float, label: Tensor | None = None
    ) -> LinearDPOResult:
        """Compute the loss of B pairs.

        Args:
            prediction: ``(2B, C, ...)`` the policy's output, chosen images first.
            reference: ``(2B, C, ...)`` the reference's output.
            target: ``(2B, C, ...)`` what the network is to predict.
            beta: β of the implicit rewards.
            label: ``(B,)`` probabilities y that the chosen image wins, None for 1. The loss is y times that of the pair
                and 1 − y times that of the pair in the other order.
        """
        chosen, rejected = denoising_error(prediction, target).chunk(2)
        # Without gradient: the weight is a constant of the step, as released; only the errors are learned from.
        won, lost = implicit_rewards(prediction.detach(), reference, target, beta).chunk(2)
        margin = won - lost
        weight = self._weight(margin)
        if label is not None:
            weight = label * weight - (1 - label) * self._weight(-margin)
        return LinearDPOResult(weight * (chosen - rejected), weight, margin)

    def _weight(self, margin: Tensor) -> Tensor:
        # The slope is the released code's 0.2 β of the difference of errors, which is −2 m / β.
        return (0.5 - 0.4 * margin).clamp(self.eta, 1 - self.eta)
