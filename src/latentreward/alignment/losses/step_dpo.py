r"""Step-level DPO: raise the probability of the better of two next states that a sampler drew from one state.

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


def clamped_log_ratio(log_prob: Tensor, reference: Tensor, clip_range: float) -> Tensor:
    r"""Compute :math:`\log\mathrm{clamp}(\exp(\log p - \log p_{\mathrm{ref}}), 1 \pm \epsilon)`, ``(B,)`` float64.

    The logarithm is clamped instead of the ratio: the result is the same, and exp cannot overflow. A clamped entry has
    no gradient.

    Args:
        log_prob: ``(B,)`` log-probabilities under the policy.
        reference: ``(B,)`` log-probabilities under the reference.
        clip_range: ε, in (0, 1).
    """
    difference = to_float64(log_prob) - to_float64(reference)
    return difference.clamp(math.log1p(-clip_range), math.log1p(clip_range))


class StepDPOResult(NamedTuple):
    """Loss and training statistics; all scalars, float32.

    Attributes:
        loss: Mean over the pairs.
        implicit_accuracy: Share of pairs whose clamped probability ratio is greater for the chosen state.
        margin: Mean of the chosen state's clamped ratio − the rejected state's; not DPO's margin β·Δlog-ratio.
        clamped: Share of pairs with at least one clamped ratio.
    """

    loss: Tensor
    implicit_accuracy: Tensor
    margin: Tensor
    clamped: Tensor


class StepPairLoss(SetLoss):
    """Base class of losses of pairs of next states, from their log-probabilities under policy and reference."""

    @abstractmethod
    @returns(
        lambda found, loss, chosen, *given: (
            of_class(StepDPOResult)(found) or wrong_tensor(found.loss, (), "floats") or detached(found.loss, chosen)
        )
    )
    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> StepDPOResult:
        """Compute the loss of B pairs.

        Args:
            chosen: ``(B,)`` log-probability of the better next state under the policy.
            rejected: ``(B,)`` log-probability of the worse next state under the policy.
            ref_chosen: ``(B,)`` log-probability of the better next state under the reference, without gradient.
            ref_rejected: ``(B,)`` log-probability of the worse next state under the reference, without gradient.
        """


class StepDPO(StepPairLoss):
    """Step-level DPO with clamped ratios.

    The loss is computed in float64: a log-ratio of some 1e-4 is the difference of two numbers near 1, and β magnifies
    the rounding error of that difference. The results are float32, also under autocast.

    Args:
        beta: β; 500 in LPO, 10 in SPO.
        clip_range: ε, in (0, 1); the papers use 0.1.

    Raises:
        InputError: If an argument is out of range.

    Note:
        The released code computes log(sigmoid(x)) in float32, which is infinite for x below −88.7; β = 500 and ε = 0.1
        reach −100.3. Here such a pair has a finite loss, and no gradient because both ratios are clamped.
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
