"""Bradley–Terry: the reward difference is the log-odds of winning."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.contracts import PairScores
from latentreward.errors import InputError
from latentreward.losses.base import PreferenceLoss, beside, mean_over_outputs


def bradley_terry_nll(margin: Tensor, label: Tensor) -> Tensor:
    r"""Negative log-likelihood of a soft label under Bradley–Terry.

    .. math:: l = -y \log\sigma(d) - (1 - y) \log\sigma(-d), \qquad \partial l / \partial d = \sigma(d) - y

    Finite, with a finite gradient, for every finite float32 margin.

    Args:
        margin: Chosen minus rejected reward d, ``(B,)`` or ``(B, out_dim)``.
        label: Probability y that chosen wins, broadcastable to ``margin``, in [0, 1].

    Returns:
        Loss in the shape of ``margin``, float64.
    """
    margin, label = margin.double(), label.double()
    return -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin)


class BradleyTerryLoss(PreferenceLoss):
    r"""Bradley–Terry negative log-likelihood, optionally with a margin that the winner has to exceed.

    .. math:: l = \mathrm{NLL}\bigl(d - (2y - 1)\,m,\; y\bigr)

    A certain pair (y = 1) then gives :math:`-\log\sigma(d - m)`, the released form. The margin shrinks with the
    label's certainty and vanishes for a tie (y = ½), which has no side that could be asked to lead; exchanging the
    sides changes nothing.

    Args:
        margin: Lead m that a certain winner must have before its gradient fades, in reward units, at least 0.

    Raises:
        InputError: If ``margin`` is negative or not finite.
    """

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(margin) and margin >= 0):
            raise InputError(f"margin = {margin} must be at least 0 and finite; 0 is plain Bradley–Terry")
        self.margin = margin

    def per_pair(self, scores: PairScores) -> Tensor:
        """See the class."""
        margin = scores.margin.double()
        label = beside(scores.label.double(), margin)
        return mean_over_outputs(bradley_terry_nll(margin - (2 * label - 1) * self.margin, label))

    def win_probability(self, scores: PairScores) -> Tensor:
        """``sigmoid(d)``; the margin belongs to training, not to the model of the choice."""
        return torch.sigmoid(scores.margin)
