r"""Losses against given values of the images: labels of single images, and scores of a teacher (distillation).

A value NaN means that the image has none: its term is left out. A pair without values has loss 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.core.contracts import PairScores, PairTargets
from latentreward.core.errors import InputError, check_range
from latentreward.reward.losses.base import PreferenceLoss, bradley_terry_nll, mean_over_outputs, per_row


def gaussian_nll(score: Tensor, target: Tensor, std: Tensor | None = None) -> Tensor:
    r"""Compute the squared error of a score or, with a standard deviation u, the Gaussian negative log-likelihood.

    .. math:: l = (r - s)^2, \qquad l = \frac{(r - s)^2}{2u^2} + \log u

    r is the score, of any shape, and s the teacher's. The loss is float64; the constant ½ log 2π is left out.
    """
    error = (score.double() - target.double()).square()
    return error if std is None else error / (2 * std.double().square()) + std.double().log()


def teacher_preference(targets: PairTargets, temperature: float = 1.0) -> Tensor:
    r"""Compute the teacher's probability that the chosen image is the better one.

    .. math:: \Phi\Bigl(\frac{s_a - s_b}{\sqrt{u_a^2 + u_b^2}}\Bigr), \quad
        \text{without uncertainties } \sigma\Bigl(\frac{s_a - s_b}{\tau}\Bigr)

    s are the teacher's scores, u its uncertainties if it gives them, and τ is the temperature. The result is float64.
    """
    gap = targets.chosen.double() - targets.rejected.double()
    if targets.chosen_std is None or targets.rejected_std is None:
        return torch.sigmoid(gap / temperature)
    return torch.special.ndtr(gap / torch.hypot(targets.chosen_std.double(), targets.rejected_std.double()))


class TargetLoss(PreferenceLoss):
    """Base class of losses that compare each score of the head with a column of given values."""

    def targets_of(self, scores: PairScores) -> PairTargets:
        """Return the given values of a batch; raise InputError if there are none, or not one for each score."""
        if scores.targets is None:
            needed = f"{type(self).__name__} needs given values of the images"
            raise InputError(f"{needed}, and the batch has none; set data.targets")
        if scores.targets.chosen.shape != scores.chosen.shape:
            columns, outputs = (1 if t.ndim == 1 else t.shape[1] for t in (scores.targets.chosen, scores.chosen))
            raise InputError(f"data.targets: {columns} columns for {outputs} scores of the head; let them agree")
        return scores.targets

    def check_targets(self, values: Tensor | None) -> None:
        """Check the values ``(N, 2, T, K)`` of a split before the first batch; raise InputError if there are none."""
        if values is None:
            raise InputError(f"{type(self).__name__} needs given values of this split's images; name a table of them")

    def win_probability(self, scores: PairScores) -> Tensor:
        """Return ``sigmoid(d)``, as under Bradley–Terry."""
        return torch.sigmoid(scores.margin)


class LabelLoss(TargetLoss):
    r"""Binary cross-entropy of single images' labels, :math:`-y\log\sigma(r) - (1-y)\log\sigma(-r)`.

    The loss of a pair is the mean over its labelled images. Unlike a loss on pairs it fixes the zero of the scores:
    σ(r) is the probability that an image is good (PAVRM, arXiv:2511.21541).

    Args:
        label_smoothing: e in [0, ½]; a label y counts as y(1 − e) + e/2.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_range("[0, 0.5]", "0 takes labels as given", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def check_targets(self, values: Tensor | None) -> None:
        super().check_targets(values)
        if values is not None:
            check_labels(values[:, :, 0])

    def per_pair(self, scores: PairScores) -> Tensor:
        return mean_over_outputs(label_loss(scores, self.targets_of(scores), self.label_smoothing))


class RegressionDistillation(TargetLoss):
    """Mean squared error to a teacher's scores; with the teacher's uncertainties, the Gaussian likelihood.

    The loss of a pair is the mean over its images with a value; see :func:`gaussian_nll`. Give the teacher's scores
    z-scored (``data.targets.standardise``), so that a head's scores begin near them.
    """

    def per_pair(self, scores: PairScores) -> Tensor:
        targets = self.targets_of(scores)
        chosen = masked_loss(gaussian_nll, scores.chosen, targets.chosen, targets.chosen_std)
        rejected = masked_loss(gaussian_nll, scores.rejected, targets.rejected, targets.rejected_std)
        return mean_over_outputs(mean_over_images(chosen, rejected))


class RankingDistillation(TargetLoss):
    """Cross-entropy of σ(margin) to the teacher's probability that chosen wins, :func:`teacher_preference`.

    Args:
        temperature: τ, positive, in units of the given scores; used if the teacher gives no uncertainties.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_range("(0, inf)", "1 suits z-scored scores", temperature=temperature)
        self.temperature = temperature

    def per_pair(self, scores: PairScores) -> Tensor:
        preference = teacher_preference(self.targets_of(scores), self.temperature)
        return mean_over_outputs(masked_loss(bradley_terry_nll, scores.margin, preference)[0])


def check_labels(values: Tensor) -> None:
    """Raise InputError if a value is not in [0, 1]; NaN is no label."""
    inside = ((values >= 0) & (values <= 1)) | values.isnan()
    if not inside.all():  # also of an estimate's stand-ins, which have no values
        held = f"data.targets holds {values[~inside][0]:g}, which is no label"
        raise InputError(f"{held}; give columns in [0, 1] and standardise: false")


def label_loss(scores: PairScores, targets: PairTargets, smoothing: float) -> Tensor:
    """Compute the mean cross-entropy of a pair's labelled images, in the shape of the scores."""
    for values in (targets.chosen, targets.rejected):
        check_labels(values)
    sides = (scores.chosen, targets.chosen), (scores.rejected, targets.rejected)
    smooth = ((score, label * (1 - smoothing) + smoothing / 2) for score, label in sides)
    return mean_over_images(*(masked_loss(bradley_terry_nll, *side) for side in smooth))


def masked_loss(loss: Callable[..., Tensor], score: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute ``loss(score, *given)``, and where no given value is NaN; elsewhere the loss is 0, without a gradient."""
    known = torch.stack([~values.isnan() for values in given if values is not None]).all(dim=0)
    # torch.where alone is not enough: NaN times 0 is NaN in the backward pass of the branch not taken.
    safe = [None if values is None else torch.where(known, values, 1.0) for values in (score, *given)]
    return torch.where(known, loss(*safe), 0.0), known


def mean_over_images(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]) -> Tensor:
    """Average the losses of a pair's two images, as :func:`masked_loss` gives them, over the known ones; 0 if none."""
    return (chosen[0] + rejected[0]) / (chosen[1].long() + rejected[1]).clamp_min(1)


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
        if self.label_weight:
            super().check_targets(values)
            if values is not None:
                check_labels(values[:, :, 0])

    def per_pair(self, scores: PairScores) -> Tensor:
        margin = scores.margin.double()
        label = per_row(scores.label.double(), margin)
        first = self.label_smoothing + (1 - 2 * self.label_smoothing) * label
        wins, loses = -logsigmoid(margin - self.margin), -logsigmoid(-margin - self.margin)
        factor = torch.where(label == 0.5, 2 * self.tie_weight, 1.0)
        loss = factor * (first * wins + (1 - first) * loses)
        if self.label_weight:
            loss = loss + self.label_weight * label_loss(scores, self.targets_of(scores), self.label_smoothing)
        return mean_over_outputs(loss)
