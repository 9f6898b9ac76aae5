"""Bradley–Terry loss, by which the reward difference is the log-odds that the chosen image wins."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.core.contracts import PairScores
from latentreward.core.errors import check_range
from latentreward.reward.losses.base import PreferenceLoss, mean_over_outputs, per_row


def bradley_terry_nll(margin: Tensor, label: Tensor) -> Tensor:
    r"""Compute the negative log-likelihood of a soft label under Bradley–Terry.

    .. math:: l = -y \log\sigma(d) - (1 - y) \log\sigma(-d), \qquad \partial l / \partial d = \sigma(d) - y

    Loss and gradient are finite for every finite float32 margin.

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

    A certain label (y = 1) gives :math:`-\log\sigma(d - m)`, the released form. The required margin shrinks as the
    label gets less certain, and is 0 for a tie (y = ½), which has no winner. The loss is symmetric: exchanging chosen
    and rejected changes nothing.

    Args:
        margin: Margin m, in reward units, at least 0; the gradient of a pair with label 1 fades only once d exceeds m.

    Raises:
        InputError: If ``margin`` is negative or not finite.
    """

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        check_range("[0, inf)", "0 is plain Bradley–Terry", margin=margin)
        self.margin = margin

    def per_pair(self, scores: PairScores) -> Tensor:
        """See :meth:`PreferenceLoss.per_pair`; the formula is in the class docstring."""
        margin = scores.margin.double()
        label = per_row(scores.label.double(), margin)
        return mean_over_outputs(bradley_terry_nll(margin - (2 * label - 1) * self.margin, label))

    def win_probability(self, scores: PairScores) -> Tensor:
        """Return ``sigmoid(d)``, without the margin, which only shapes the training loss."""
        return torch.sigmoid(scores.margin)
