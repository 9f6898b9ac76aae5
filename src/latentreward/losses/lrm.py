r"""LRM's preference loss: the pair against each other, and against the rest of the batch (arXiv:2502.01051).

Scores are temperature-scaled similarities :math:`s = e^\tau \cos(T, V)`; a prompt's two images compete as the two
classes of a softmax. The batch form adds in-batch negatives as CLIP does, in both directions.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from latentreward.contracts import CrossScores, PairScores
from latentreward.errors import InputError, did_you_mean
from latentreward.losses.base import PreferenceLoss, beside, mean_over_outputs
from latentreward.losses.bradley_terry import bradley_terry_nll

Mode = Literal["pair", "batch", "both"]


def _tie_offset(label: Tensor) -> Tensor:
    """``log ½`` where y = ½ exactly, else 0: the least loss of a tie becomes 0."""
    return (label == 0.5).to(label.dtype) * math.log(0.5)


def lrm_pair_loss(margin: Tensor, label: Tensor) -> Tensor:
    r"""Cross-entropy of the two images of a prompt.

    .. math:: l = -y\log\sigma(d) - (1-y)\log\sigma(-d) + [y = ½] \log ½

    Args:
        margin: Chosen minus rejected score d, ``(B,)`` or ``(B, out_dim)``.
        label: Probability y that chosen wins, broadcastable to ``margin``.

    Returns:
        In the shape of ``margin``, float64; 0 at best for certain pairs and for ties.
    """
    return bradley_terry_nll(margin, label) + _tie_offset(label.double())


def lrm_batch_loss(cross: CrossScores, label: Tensor) -> Tensor:
    r"""Cross-entropies of each pair against the other prompts and images of the batch.

    With :math:`S^{c}_{ij}` the score of prompt i and the chosen image of pair j, :math:`S^{r}` likewise, half the sum
    of

    * image to text: :math:`y\,\mathrm{CE}_j(S^c_{ji}, i) + (1-y)\,\mathrm{CE}_j(S^r_{ji}, i)` over the N prompts, and
    * text to image: :math:`y\,\mathrm{CE}([S^c_i, S^r_i], i) + (1-y)\,\mathrm{CE}([S^c_i, S^r_i], N + i)` over the 2N
      images, plus :math:`\log ½` for a tie.

    Args:
        cross: Scores ``(N, N)`` of every prompt with every image.
        label: Probability y that chosen wins, ``(N,)``.

    Returns:
        ``(N,)``, float64.
    """
    label, chosen, rejected = label.double(), cross.chosen.double(), cross.rejected.double()
    image_to_text = -(
        label * chosen.log_softmax(dim=0).diagonal() + (1 - label) * rejected.log_softmax(dim=0).diagonal()
    )
    over_images = torch.cat([chosen, rejected], dim=1).log_softmax(dim=1)
    of_chosen, of_rejected = over_images.chunk(2, dim=1)
    text_to_image = -(label * of_chosen.diagonal() + (1 - label) * of_rejected.diagonal()) + _tie_offset(label)
    return 0.5 * (image_to_text + text_to_image)


class LRMLoss(PreferenceLoss):
    """LRM's criterion. ``pair`` works with any head; ``batch`` and ``both`` need scores across the whole batch.

    Args:
        mode: ``pair``, ``batch`` (in-batch negatives alone) or ``both``.
        batch_coeff: Factor on the batch term in ``both``, at least 0.
        aux_loss_coeff: Factor on pairs whose two images were scored at different noise levels, at least 0. It is
            applied after the weights are normalised, so it does not lift the other pairs.

    Raises:
        InputError: If an argument is out of range.

    Note:
        The released code weighs a pair by 1 / (rows of its prompt); that is ``PairScores.weight``.
    """

    def __init__(self, mode: Mode = "pair", batch_coeff: float = 1.0, aux_loss_coeff: float = 1.0) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise InputError(f"mode = {mode!r} is not known{did_you_mean(str(mode), get_args(Mode))}")
        for name, value in (("batch_coeff", batch_coeff), ("aux_loss_coeff", aux_loss_coeff)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} = {value} must be at least 0 and finite; 1 leaves the term as it is")
        self.mode, self.batch_coeff, self.aux_loss_coeff = mode, batch_coeff, aux_loss_coeff
        self.needs_cross_scores = mode != "pair"

    def per_pair(self, scores: PairScores) -> Tensor:
        """Loss of each pair, ``aux_loss_coeff`` included.

        Raises:
            InputError: If the mode needs scores across the batch and there are none.
            ValueError: If they do not cover these pairs.
        """
        differ = (scores.chosen_sigmas != scores.rejected_sigmas).double()
        factor = 1 + (self.aux_loss_coeff - 1) * differ
        if self.mode == "batch":
            return factor * lrm_batch_loss(self._cross_of(scores), scores.label)
        pair = mean_over_outputs(lrm_pair_loss(scores.margin, beside(scores.label, scores.margin)))
        if self.mode == "pair":
            return factor * pair
        return factor * (pair + self.batch_coeff * lrm_batch_loss(self._cross_of(scores), scores.label))

    def _cross_of(self, scores: PairScores) -> CrossScores:
        if scores.cross is None:
            raise InputError(
                f"mode = {self.mode!r} needs the score of every image with every prompt, which this head does not "
                "give; use mode 'pair' or a head that projects images and prompts apart"
            )
        pairs = len(scores.label)
        if scores.cross.chosen.shape != (pairs, pairs):
            raise ValueError(
                f"cross scores are {tuple(scores.cross.chosen.shape)} for {pairs} pairs; gather features over the "
                "ranks before making them"
            )
        return scores.cross

    def win_probability(self, scores: PairScores) -> Tensor:
        """``sigmoid(d)``: the softmax over the two images of a prompt."""
        return torch.sigmoid(scores.margin)
