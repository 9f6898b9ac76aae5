"""SoliReward's loss: Bradley–Terry with a margin, a term for ties, and labels of single images."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.core.contracts import PairScores
from latentreward.core.errors import check_range
from latentreward.reward.losses.base import mean_over_outputs, per_row
from latentreward.reward.losses.targets import TargetLoss, check_labels, label_loss


class TieLoss(TargetLoss):
    r"""SoliReward's loss (arXiv:2512.22170): Bradley–Terry with a margin, and a term that pulls ties together.

    .. math:: l = -(1-e)\log\sigma(d - m) - e\log\sigma(-d - m), \qquad
        l_{\mathrm{tie}} = -\log\sigma(d - m) - \log\sigma(-d - m)

    The loss of a tie is smallest at d = 0: 2·softplus(m). For a label y between ½ and 1 the weight of the first term is
    y(1 − e) + (1 − y)e instead of 1 − e. The mean is over all pairs, winners and ties together.

    Args:
        margin: Margin m, in reward units, at least 0; 3 in the released configs.
        tie_weight: Factor on the loss of ties, at least 0.
        label_smoothing: e, in [0, ½]; a label y of a single image counts as y(1 − e) + e/2.
        label_weight: Factor on the binary cross-entropy of single images' labels (:class:`LabelLoss`), at least 0; the
            data then need ``targets``.

    Raises:
        InputError: If an argument is out of range.

    Note:
        The released code takes the first image as the better one, even if the given qualities say the reverse; here
        the label decides. Ties of two bad images count as ties, as released.
    """

    def __init__(
        self, margin: float = 3.0, tie_weight: float = 1.0, label_smoothing: float = 0.0, label_weight: float = 0.0
    ) -> None:
        super().__init__()
        check_range("[0, inf)", margin=margin, tie_weight=tie_weight, label_weight=label_weight)
        check_range("[0, 0.5]", "0 takes labels as given", label_smoothing=label_smoothing)
        self.margin, self.tie_weight = margin, tie_weight
        self.label_smoothing, self.label_weight = label_smoothing, label_weight

    def check_targets(self, values: Tensor | None) -> None:
        """See :meth:`TargetLoss.check_targets`; nothing is needed without ``label_weight``."""
        if self.label_weight:
            super().check_targets(values)
            if values is not None:
                check_labels(values[:, :, 0])

    def per_pair(self, scores: PairScores) -> Tensor:
        """See :meth:`PreferenceLoss.per_pair`; the formula is in the class docstring."""
        margin = scores.margin.double()
        label = per_row(scores.label.double(), margin)
        first = self.label_smoothing + (1 - 2 * self.label_smoothing) * label
        wins, loses = -logsigmoid(margin - self.margin), -logsigmoid(-margin - self.margin)
        factor = torch.where(label == 0.5, 2 * self.tie_weight, 1.0)
        loss = factor * (first * wins + (1 - first) * loses)
        if self.label_weight:
            loss = loss + self.label_weight * label_loss(scores, self.targets_of(scores), self.label_smoothing)
        return mean_over_outputs(loss)
