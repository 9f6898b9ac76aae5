r"""The losses of the DPO family: Diffusion-DPO and Linear-DPO of finished images, and step-level DPO of LPO and SPO.

Diffusion-DPO (arXiv:2311.12908) takes implicit rewards of images from a policy's denoising error.

.. math:: l = -\log\sigma(\hat r_w - \hat r_l), \qquad
    \hat r = -\frac{\beta}{2}\bigl(\lVert y - f_\theta(x_t, t, c)\rVert^2
    - \lVert y - f_{\mathrm{ref}}(x_t, t, c)\rVert^2\bigr)

The squared norm is a mean over elements, and β is meant for that mean. The target y is what the network predicts. The
loss is eq. 14 of the paper with βTω(λ_t) as one constant β, as in its released code. :func:`implicit_rewards` computes
r̂; the rest is :class:`~latentreward.reward.BradleyTerryLoss`, which also takes soft labels.

In Linear-DPO (arXiv:2605.21123) the gradient does not vanish for correctly ranked pairs. With the denoising errors e of
the two images, Δ = e_w − e_l under the policy, and the margin m of implicit rewards,

.. math:: L = u\,\Delta, \qquad u = \mathrm{clip}\bigl(\tfrac12 - 0.4\,m,\; \eta,\; 1 - \eta\bigr).

u is detached. Plain DPO has σ(−m) β / 2 in place of u, which falls exponentially as m grows; u lacks the factor β / 2,
so learning rates differ.

Step-level DPO raises the probability of the better of two next states that a sampler drew from one state.

.. math:: l = -\log\sigma(\beta \log r_w - \beta \log r_l), \qquad
    r = \mathrm{clamp}\Bigl(\frac{p_\theta(x_{t-1} \mid x_t, c)}{p_{\mathrm{ref}}(x_{t-1} \mid x_t, c)},
    \; 1 \pm \epsilon\Bigr)

LPO (arXiv:2502.01051) and SPO (arXiv:2406.04314), after DPO (arXiv:2305.18290, eq. 7).
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.core.contracts import to_float64
from latentreward.core.errors import check_range
from latentreward.core.promises import detached, of_class, returns, wrong_tensor
from latentreward.reward.losses.base import SetLoss


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error over elements of two ``(N, C, ...)`` tensors: ``(N,)`` float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def implicit_rewards(prediction: Tensor, reference: Tensor, target: Tensor, beta: float = 5000.0) -> Tensor:
    r"""Compute implicit rewards: β/2 times how much lower the policy's denoising error is than the reference's.

    Outputs f of both networks and the target y are ``(N, C, ...)``, the rewards ``(N,)`` float32. At the start, where
    both networks agree, the reward is exactly 0. The paper's β, 2000 (SD1.5) and 5000 (SDXL), are for means over
    elements.
    """
    prediction, reference, target = prediction.float(), reference.float(), target.float()
    # (f − r)(f + r − 2y) = (f − y)² − (r − y)², without the cancellation of two errors near 1.
    change = (prediction - reference) * (prediction + reference - 2 * target)
    return -0.5 * beta * change.flatten(1).mean(dim=1)


class LinearDPOResult(NamedTuple):
    """Result for B pairs."""

    per_pair: Tensor  # ``(B,)`` loss of each pair
    weight: Tensor  # ``(B,)`` u, without gradient; with labels y it is y u(m) − (1 − y) u(−m)
    margin: Tensor  # ``(B,)`` margin m, without gradient


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
        """Compute the loss of B pairs from outputs and target ``(2B, C, ...)``, chosen images first.

        ``label`` ``(B,)`` are probabilities y that the chosen image wins, None for 1. The loss is y times that of the
        pair and 1 − y times that of the pair in the other order.
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


def clamped_log_ratio(log_prob: Tensor, reference: Tensor, clip_range: float) -> Tensor:
    """Compute log clamp(p / p_ref, 1 ± ε) from log-probabilities ``(B,)``: ``(B,)`` float64."""
    # The logarithm is clamped instead of the ratio: the result is the same, and exp cannot overflow.
    difference = to_float64(log_prob) - to_float64(reference)
    return difference.clamp(math.log1p(-clip_range), math.log1p(clip_range))


class StepDPOResult(NamedTuple):
    """Loss and training statistics; all scalars, float32."""

    loss: Tensor  # Mean over the pairs
    implicit_accuracy: Tensor  # Share of pairs whose clamped probability ratio is greater for the chosen state
    margin: Tensor  # Mean of the chosen state's clamped ratio − the rejected state's; not DPO's margin β·Δlog-ratio
    clamped: Tensor  # Share of pairs with at least one clamped ratio


class StepPairLoss(SetLoss):
    """Base class of losses of pairs of next states, from their log-probabilities under policy and reference."""

    @abstractmethod
    @returns(
        lambda found, loss, chosen, *given: (
            of_class(StepDPOResult)(found) or wrong_tensor(found.loss, (), "floats") or detached(found.loss, chosen)
        )
    )
    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> StepDPOResult:
        """Compute the loss of B pairs from log-probabilities ``(B,)`` of the better and the worse next state.

        The last two are those under the reference, without gradient.
        """


class StepDPO(StepPairLoss):
    """Step-level DPO with clamped ratios.

    The released code computes log(sigmoid(x)) in float32, which is infinite for x below −88.7; β = 500 and ε = 0.1
    reach −100.3. Here, in float64, such a pair has a finite loss, and no gradient because both ratios are clamped.

    Args:
        beta: β; 500 in LPO, 10 in SPO.
        clip_range: ε, in (0, 1); the papers use 0.1.
    """

    def __init__(self, beta: float = 500.0, clip_range: float = 0.1) -> None:
        super().__init__()
        check_range("(0, inf)", "LPO uses 500, SPO 10", beta=beta)
        check_range("(0, 1)", "LPO and SPO use 0.1", clip_range=clip_range)
        self.beta, self.clip_range = beta, clip_range

    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> StepDPOResult:
        chosen, rejected, ref_chosen, ref_rejected = map(to_float64, (chosen, rejected, ref_chosen, ref_rejected))
        # The released code clamps the ratio in float32, where a difference of 1e-4 has three digits.
        win_log_ratio = clamped_log_ratio(chosen, ref_chosen, self.clip_range)
        lose_log_ratio = clamped_log_ratio(rejected, ref_rejected, self.clip_range)
        loss = -logsigmoid(self.beta * (win_log_ratio - lose_log_ratio)).mean()
        with torch.no_grad():
            clamped = (win_log_ratio != chosen - ref_chosen) | (lose_log_ratio != rejected - ref_rejected)
            parts = (win_log_ratio > lose_log_ratio, win_log_ratio.exp() - lose_log_ratio.exp(), clamped)
        return StepDPOResult(loss.float(), *(part.double().mean().float() for part in parts))


class StepRatios(NamedTuple):
    """Log-probability ratios of policy to reference on B pairs, for callbacks."""

    timesteps: Tensor  # ``(B,)``
    chosen: Tensor  # ``(B,)`` log-probability of the better next state, policy minus reference
    rejected: Tensor  # ``(B,)`` log-probability of the worse next state, policy minus reference
