"""Losses against given values: hand values, gradients, images without a value, and refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentreward.core.contracts import PairScores, PairTargets
from latentreward.core.errors import InputError
from latentreward.reward import (
    LabelLoss,
    PreferenceLoss,
    RankingDistillation,
    RegressionDistillation,
    TieLoss,
    bradley_terry_nll,
    gaussian_nll,
    teacher_preference,
)
from tests.reward.losses.pairs import random_scores, scores_of

NAN = math.nan
TAUGHT = {"labels": LabelLoss(), "regression": RegressionDistillation(), "ranking": RankingDistillation()}
every_loss = pytest.mark.parametrize("loss", TAUGHT.values(), ids=TAUGHT.keys())


def taught(scores: PairScores, chosen: Tensor, rejected: Tensor, *std: Tensor) -> PairScores:
    return replace(scores, targets=PairTargets(chosen, rejected, *std))


def random_targets(scores: PairScores) -> PairScores:
    generator = torch.Generator().manual_seed(9)
    return taught(scores, *torch.rand(2, *scores.chosen.shape, generator=generator))


def test_label_by_hand() -> None:
    loss = bradley_terry_nll(torch.tensor([0.0, 2.0, -2.0, 1e4]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    expected = torch.tensor([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2)), 1e4])
    torch.testing.assert_close(loss, expected.double())


def test_gaussian_nll_by_hand() -> None:
    score, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(gaussian_nll(score, target), torch.tensor([1.0, 4.0]).double())
    expected = torch.tensor([1 / 8 + math.log(2), 4 / 2]).double()
    torch.testing.assert_close(gaussian_nll(score, target, torch.tensor([2.0, 1.0])), expected)


def test_teacher_preference_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    logistic = torch.tensor([1 / (1 + math.exp(-0.5)), 0.5]).double()
    torch.testing.assert_close(teacher_preference(PairTargets(*scores), temperature=2.0), logistic)
    spread = torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0])
    normal = torch.tensor([0.5 * (1 + math.erf(0.2 / math.sqrt(2))), 0.5]).double()
    torch.testing.assert_close(teacher_preference(PairTargets(*scores, *spread)), normal)


@every_loss
def test_least_where_the_student_is_the_teacher(loss: PreferenceLoss) -> None:
    """With a teacher's probability as the label the least cross-entropy is where the logistic function equals it."""
    target = torch.tensor([0.3, 0.6, 0.9])
    student = target.logit() if isinstance(loss, LabelLoss) else target
    scores = student.clone().requires_grad_(), student.flip(0).clone().requires_grad_()
    given = taught(replace(scores_of(scores[0]), rejected=scores[1]), target, target.flip(0))
    for slope in torch.autograd.grad(loss(given), scores):
        torch.testing.assert_close(slope, torch.zeros(3), atol=1e-6, rtol=0)


@every_loss
def test_images_without_a_value_are_left_out(loss: PreferenceLoss) -> None:
    full = random_targets(random_scores(3))
    chosen, rejected = full.targets.chosen.clone(), full.targets.rejected.clone()
    chosen[0], chosen[1], rejected[1] = NAN, NAN, NAN
    scores = full.chosen.clone().requires_grad_()
    parts = loss.per_pair(taught(replace(full, chosen=scores), chosen, rejected))
    assert parts.isfinite().all()
    assert parts[1] == 0
    torch.testing.assert_close(parts[2:], loss.per_pair(full)[2:])
    slope = torch.autograd.grad(parts.sum(), scores)[0]
    assert slope.isfinite().all()
    assert slope[:2].tolist() == [0, 0]
    assert (slope[2:] != 0).all()


@pytest.mark.parametrize("loss", [RegressionDistillation(), RankingDistillation()])
def test_a_value_without_its_uncertainty_is_left_out(loss: PreferenceLoss) -> None:
    scores, std = scores_of(torch.tensor([0.3, 0.4])), torch.tensor([1.0, NAN])
    chosen = scores.chosen.clone().requires_grad_()
    parts = loss.per_pair(taught(replace(scores, chosen=chosen), *torch.ones(2, 2), std, std))
    (slope,) = torch.autograd.grad(parts.sum(), chosen)
    assert parts[0] != 0 != slope[0] and parts[1] == 0 == slope[1]


@every_loss
def test_a_score_that_is_not_finite_is_no_missing_value(loss: PreferenceLoss) -> None:
    """Its loss ends a run before the backward pass, whose gradient would be NaN. Without a value it counts nowhere."""
    full = random_targets(random_scores(3))
    chosen = full.chosen.clone()
    chosen[2] = NAN
    assert loss(replace(full, chosen=chosen)).isnan()
    given = full.targets.chosen.clone()
    given[2] = NAN
    chosen.requires_grad_()
    loss(taught(replace(full, chosen=chosen), given, full.targets.rejected)).backward()
    assert chosen.grad.isfinite().all()


@every_loss
def test_several_outputs_have_targets_of_their_own(loss: PreferenceLoss) -> None:
    scores = random_targets(random_scores(1, out_dim=2))
    columns = [
        loss.per_pair(
            taught(
                replace(scores, chosen=scores.chosen[:, i], rejected=scores.rejected[:, i]),
                scores.targets.chosen[:, i],
                scores.targets.rejected[:, i],
            )
        )
        for i in range(2)
    ]
    torch.testing.assert_close(loss.per_pair(scores), torch.stack(columns).mean(dim=0))


@pytest.mark.parametrize("loss", [*TAUGHT.values(), TieLoss(label_weight=1.0)], ids=str)
def test_refuses_data_without_targets_or_with_too_few_columns(loss: PreferenceLoss) -> None:
    with pytest.raises(InputError, match=r"set data\.targets"):
        loss(random_scores(0))
    scores = random_scores(0, out_dim=2)
    with pytest.raises(InputError, match="1 columns for 2 scores of the head"):
        loss(taught(scores, scores.chosen[:, 0], scores.rejected[:, 0]))


def test_refuses_values_that_are_no_labels() -> None:
    with pytest.raises(InputError, match=r"1\.5, which is no label"):
        LabelLoss()(taught(random_scores(0), torch.full((6,), 1.5), torch.zeros(6)))
