"""LRM's criterion against a row-by-row one in numpy; ties, weights, two noise levels, refused input."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from latentreward.core.contracts import CrossScores, PairScores
from latentreward.core.errors import InputError
from latentreward.reward import LRMLoss, lrm_pair_loss
from tests.oracles.preference_losses import lrm_criterion
from tests.reward.losses.pairs import random_scores, scores_of


@pytest.mark.parametrize("mode", ["pair", "batch", "both"])
@pytest.mark.parametrize(("batch_coeff", "aux_loss_coeff"), [(1.0, 1.0), (0.3, 0.25)])
def test_equals_row_by_row_criterion(mode: str, batch_coeff: float, aux_loss_coeff: float) -> None:
    generator = torch.Generator().manual_seed(3)
    image_0, image_1, text = normalize(torch.randn(3, 5, 8, generator=generator, dtype=torch.float64), dim=-1)
    log_scale = 2.0
    cross = CrossScores(*(np.exp(log_scale) * text @ image.T for image in (image_0, image_1)))
    label = torch.tensor([0.0, 0.5, 1.0, 0.8, 0.5])
    weight = torch.tensor([1.0, 1 / 3, 0.5, 1.0, 0.25])
    sigmas = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.9, 0.3, 0.2, 0.5]])
    scores = PairScores(cross.chosen.diagonal(), cross.rejected.diagonal(), label, weight, sigmas[0], sigmas[1], cross)
    loss = LRMLoss(mode, batch_coeff, aux_loss_coeff)(scores)
    expected = lrm_criterion(
        *(x.numpy() for x in (image_0, image_1, text)),
        log_scale=log_scale,
        label_0=label.double().numpy(),
        weight=weight.double().numpy(),
        differ=(sigmas[0] != sigmas[1]).numpy(),
        mode=mode,
        batch_coeff=batch_coeff,
        aux_loss_coeff=aux_loss_coeff,
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_tie_has_minimum_zero_at_equal_scores() -> None:
    margins = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    loss = lrm_pair_loss(margins, torch.tensor(0.5))
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(margins.grad.sign(), torch.tensor([-1.0, 0.0, 1.0]))


def test_aux_coefficient_touches_only_pairs_with_two_levels() -> None:
    scores = random_scores(0)
    differ = scores.chosen_sigmas != scores.rejected_sigmas
    ratio = LRMLoss(aux_loss_coeff=0.25).per_pair(scores) / LRMLoss().per_pair(scores)
    torch.testing.assert_close(ratio, torch.where(differ, 0.25, 1.0).double())


@pytest.mark.parametrize("mode", ["pair", "batch", "both"])
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_finite_for_large_scores(mode: str, size: float) -> None:
    scores = random_scores(1, cross=True)
    chosen = (scores.cross.chosen * size).requires_grad_()
    cross = CrossScores(chosen, scores.cross.rejected * size)
    scores = replace(scores, chosen=chosen.diagonal(), rejected=cross.rejected.diagonal(), cross=cross)
    loss = LRMLoss(mode)(scores)
    loss.backward()
    assert loss.isfinite()
    assert chosen.grad.isfinite().all()


def test_only_batch_modes_need_cross_scores() -> None:
    assert [LRMLoss(mode).needs_cross_scores for mode in ("pair", "batch", "both")] == [False, True, True]
    with pytest.raises(InputError, match=re.escape("use mode 'pair' or a head that embeds")):
        LRMLoss("both")(scores_of(torch.ones(3)))


def test_cross_scores_of_one_rank_alone_are_refused() -> None:
    scores = replace(scores_of(torch.ones(4)), cross=CrossScores(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(ValueError, match="gather features over the ranks"):
        LRMLoss("batch")(scores)
