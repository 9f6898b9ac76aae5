r"""LRM's preference loss (arXiv:2502.01051): cross-entropy within a pair, and against the other pairs of the batch.

Scores are temperature-scaled similarities :math:`s = e^\tau \cos(T, V)` of text and image embeddings. The pair form is
a softmax over a prompt's two images. The batch form uses in-batch negatives as CLIP does, in both directions.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from latentreward.core.contracts import CrossScores, PairScores
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.reward.losses.base import PreferenceLoss, bradley_terry_nll, mean_over_outputs, per_row

Mode = Literal["pair", "batch", "both"]


def _tie_offset(label: Tensor) -> Tensor:
    """Return ``log ½`` where y = ½ exactly, else 0; adding this value makes the lowest loss of a tie 0."""
    return (label == 0.5).to(label.dtype) * math.log(0.5)


def lrm_pair_loss(margin: Tensor, label: Tensor) -> Tensor:
    r"""Compute the cross-entropy over the two images of a prompt.

    .. math:: l = -y\log\sigma(d) - (1-y)\log\sigma(-d) + [y = ½] \log ½

    Arguments are those of :func:`bradley_terry_nll`; the minimum is 0 for certain pairs and for ties.
    """
    return bradley_terry_nll(margin, label) + _tie_offset(label.double())


def lrm_batch_loss(cross: CrossScores, label: Tensor) -> Tensor:
    r"""Compute the cross-entropy of each pair against the other prompts and images of the batch.

    Let :math:`S^{c}_{ij}` be the score of prompt i and the chosen image of pair j, and :math:`S^{r}_{ij}` that of
    prompt i and the rejected image of pair j. The loss of pair i is half the sum of

    * image to text: :math:`y\,\mathrm{CE}_j(S^c_{ji}, i) + (1-y)\,\mathrm{CE}_j(S^r_{ji}, i)` over the N prompts, and
    * text to image: :math:`y\,\mathrm{CE}([S^c_i, S^r_i], i) + (1-y)\,\mathrm{CE}([S^c_i, S^r_i], N + i)` over the 2N
      images, plus :math:`\log ½` for a tie.

    ``cross`` has scores ``(N, N)`` of every prompt with every image; the labels y are ``(N,)``, as is the float64 loss.
    """
    label, chosen, rejected = label.double(), cross.chosen.double(), cross.rejected.double()
    image_to_text = -(
        label * chosen.log_softmax(dim=0).diagonal() + (1 - label) * rejected.log_softmax(dim=0).diagonal()
    )
    # A prompt is compared with both images of every pair, its own rejected one included.
    over_images = torch.cat([chosen, rejected], dim=1).log_softmax(dim=1)
    of_chosen, of_rejected = over_images.chunk(2, dim=1)
    text_to_image = -(label * of_chosen.diagonal() + (1 - label) * of_rejected.diagonal()) + _tie_offset(label)
    return 0.5 * (image_to_text + text_to_image)


class LRMLoss(PreferenceLoss):
    """LRM's loss; ``pair`` works with any head, ``batch`` and ``both`` need every image scored with every prompt.

    Args:
        mode: ``pair``, ``batch`` (in-batch negatives alone) or ``both``.
        batch_coeff: Factor on the batch term in mode ``both``, at least 0.
        aux_loss_coeff: Factor on the loss of pairs whose two images are scored at different noise levels, at least 0.
            The factor is applied after the weights are normalised, so it does not change the weight of other pairs.

    Note:
        The released code weights a pair by 1 / (number of rows of its prompt); here ``PairScores.weight`` does that.
    """

    def __init__(self, mode: Mode = "pair", batch_coeff: float = 1.0, aux_loss_coeff: float = 1.0) -> None:
        super().__init__()
        check_choices(LRMLoss, mode=mode)
        hint = "1 leaves the term as it is"
        check_range("[0, inf)", hint, batch_coeff=batch_coeff, aux_loss_coeff=aux_loss_coeff)
        self.mode, self.batch_coeff, self.aux_loss_coeff = mode, batch_coeff, aux_loss_coeff
        self.needs_cross_scores = mode != "pair"

    def per_pair(self, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, ``aux_loss_coeff`` included: ``(B,)``, float64."""
        differ = (scores.chosen_sigmas != scores.rejected_sigmas).double()
        factor = 1 + (self.aux_loss_coeff - 1) * differ
        if self.mode == "batch":
            return factor * lrm_batch_loss(self._cross_of(scores), scores.label)
        pair = mean_over_outputs(lrm_pair_loss(scores.margin, per_row(scores.label, scores.margin)))
        if self.mode == "pair":
            return factor * pair
        return factor * (pair + self.batch_coeff * lrm_batch_loss(self._cross_of(scores), scores.label))

    def _cross_of(self, scores: PairScores) -> CrossScores:
        if scores.cross is None:
            needed = (
                f"mode = {self.mode!r} needs the score of every image with every prompt, which this head does not give"
            )
            raise InputError(f"{needed}; use mode 'pair' or a head that embeds images and prompts separately")
        pairs, shape = len(scores.label), tuple(scores.cross.chosen.shape)
        if shape != (pairs, pairs):
            raise ValueError(f"cross scores are {shape} for {pairs} pairs; gather features over the ranks first")
        return scores.cross

    def win_probability(self, scores: PairScores) -> Tensor:
        """Return ``sigmoid(d)``, the softmax over the two images of a prompt."""
        return torch.sigmoid(scores.margin)
