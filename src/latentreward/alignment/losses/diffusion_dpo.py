r"""Diffusion-DPO (arXiv:2311.12908): implicit rewards of images from a policy's denoising error.

.. math:: l = -\log\sigma(\hat r_w - \hat r_l), \qquad
    \hat r = -\frac{\beta}{2}\bigl(\lVert y - f_\theta(x_t, t, c)\rVert^2
    - \lVert y - f_{\mathrm{ref}}(x_t, t, c)\rVert^2\bigr)

The squared norm is a mean over elements, not a sum, and β is meant for that mean. The target y is what the network
predicts: noise, v, or the velocity of a flow. The loss is eq. 14 of the paper with βTω(λ_t) as one constant β, as in
its released code. This file computes the implicit rewards r̂; the rest is
:class:`~latentreward.reward.BradleyTerryLoss`, which also takes soft labels.

Linear-DPO (arXiv:2605.21123): Diffusion-DPO whose gradient does not vanish for correctly ranked pairs.

With the denoising errors e of the two images, Δ = e_w − e_l under the policy, and the margin m of implicit rewards
(:mod:`latentreward.alignment.losses.diffusion_dpo`),

.. math:: L = u\,\Delta, \qquad u = \mathrm{clip}\bigl(\tfrac12 - 0.4\,m,\; \eta,\; 1 - \eta\bigr).

u is detached. Plain DPO has σ(−m) β / 2 in place of u, which falls exponentially as m grows; u lacks the factor β / 2,
so learning rates differ.
"""

from typing import NamedTuple

from torch import Tensor

from latentreward.core.errors import check_range
from latentreward.reward.losses.base import SetLoss


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error over elements of two ``(N, C, ...)`` tensors: ``(N,)`` float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def implicit_rewards(prediction: Tensor, reference: Tensor, target: Tensor, beta: float = 5000.0) -> Tensor:
    r"""Compute implicit rewards: β/2 times how much lower the policy's denoising error is than the reference's.

    The difference of the two errors is computed element by element, as
    :math:`(f - f_{\mathrm{ref}})(f + f_{\mathrm{ref}} - 2y)`. Subtracting two errors near 1 in float32 would leave a
    rounding error that β magnifies. At the start, where both networks agree, the reward is exactly 0.

    Args:
        prediction: ``(N, C, ...)`` the policy's output f.
        reference: ``(N, C, ...)`` the reference's output, without gradient.
        target: ``(N, C, ...)`` target y of both networks.
        beta: β; the paper's 2000 (SD1.5) and 5000 (SDXL) are for means over elements.

    Returns:
        ``(N,)`` float32.
    """
    prediction, reference, target = prediction.float(), reference.float(), target.float()
    # (f − r)(f + r − 2y) = (f − y)² − (r − y)², without the cancellation of two errors near 1.
    change = (prediction - reference) * (prediction + reference - 2 * target)
    return -0.5 * beta * change.flatten(1).mean(dim=1)


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
