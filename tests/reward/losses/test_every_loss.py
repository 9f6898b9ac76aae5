"""What holds for all losses: exchanged sides, several outputs, weights, dtypes."""

from dataclasses import replace

import pytest
import torch

from latentreward.reward import (
    BradleyTerryLoss,
    ConstantVarianceThurstoneLoss,
    LRMLoss,
    PreferenceLoss,
    ThurstoneLoss,
    TieLoss,
    weighted_mean,
)
from tests.reward.losses.pairs import random_scores, scores_of, swapped

LOSSES = {
    "bradley_terry": BradleyTerryLoss(),
    "bradley_terry_margin": BradleyTerryLoss(1.0),
    "ties": TieLoss(0.5, 0.3, 0.1),
    "thurstone_mixture": ThurstoneLoss(),
    "thurstone_bhattacharyya": ThurstoneLoss(form="bhattacharyya"),
    "thurstone_nll": ThurstoneLoss("nll", sigma_u=0.2236068),
    "thurstone_constant": ConstantVarianceThurstoneLoss(),
    "lrm_pair": LRMLoss("pair", aux_loss_coeff=0.5),
    "lrm_batch": LRMLoss("batch", aux_loss_coeff=0.5),
    "lrm_both": LRMLoss("both", 0.3, 0.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
# In-batch negatives are scores of one number per image, so they have no columns.
without_negatives = pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES.values() if not loss.needs_cross_scores], ids=str
)


@every_loss
def test_exchanging_all_sides_changes_nothing(loss: PreferenceLoss) -> None:
    scores = random_scores(0, cross=True)
    torch.testing.assert_close(loss(swapped(scores)), loss(scores))
    torch.testing.assert_close(loss.win_probability(swapped(scores)), 1 - loss.win_probability(scores))


@without_negatives
def test_several_outputs_average_their_columns(loss: PreferenceLoss) -> None:
    scores = random_scores(1, out_dim=3)
    columns = [
        loss.per_pair(replace(scores, chosen=scores.chosen[:, i], rejected=scores.rejected[:, i])) for i in range(3)
    ]
    torch.testing.assert_close(loss.per_pair(scores), torch.stack(columns).mean(dim=0))
    assert loss.win_probability(scores).shape == (6, 3)


@every_loss
def test_only_ratios_of_weights_matter(loss: PreferenceLoss) -> None:
    scores = random_scores(3, cross=True)
    torch.testing.assert_close(loss(replace(scores, weight=scores.weight * 7)), loss(scores))


@without_negatives
def test_a_pair_of_weight_zero_is_as_if_absent(loss: PreferenceLoss) -> None:
    scores = random_scores(4)
    keep = torch.arange(6) != 2
    without = replace(
        scores,
        **{
            name: getattr(scores, name)[keep]
            for name in ("chosen", "rejected", "label", "weight", "chosen_sigmas", "rejected_sigmas")
        },
    )
    torch.testing.assert_close(loss(replace(scores, weight=scores.weight * keep)), loss(without))


@every_loss
def test_float32_under_autocast(loss: PreferenceLoss) -> None:
    scores = random_scores(5, cross=True)
    expected = loss(scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(scores)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@without_negatives
def test_gradient_returns_in_the_dtype_of_the_scores(loss: PreferenceLoss) -> None:
    margin = torch.tensor([0.5, -0.25], dtype=torch.bfloat16, requires_grad=True)
    value = loss(scores_of(margin, 0.9, 0.3))
    value.backward()
    assert value.dtype == torch.float32
    assert margin.grad.dtype == torch.bfloat16


@every_loss
def test_a_batch_of_weight_zero_has_loss_zero(loss: PreferenceLoss) -> None:
    scores = random_scores(6, cross=True)
    assert loss(replace(scores, weight=torch.zeros(6))) == 0


def test_weighted_mean_by_hand() -> None:
    value = weighted_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert value == 2.75


@pytest.mark.parametrize("field", ["label", "weight", "chosen_sigmas", "rejected_sigmas", "rejected"])
def test_columns_that_would_broadcast_are_refused(field: str) -> None:
    scores = random_scores(7)
    with pytest.raises(ValueError, match=field):
        BradleyTerryLoss()(replace(scores, **{field: getattr(scores, field)[:1]}))
