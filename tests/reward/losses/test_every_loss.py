"""What holds for all losses; Bradley–Terry against 50-digit arithmetic, and SoliReward's loss by hand."""

import math
from dataclasses import replace

import mpmath
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
from tests.oracles import preference_losses as oracle
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


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("label", [1.0, 0.9, 0.7, 0.5, 0.2, 0.0])
def test_value_and_gradient_equal_50_digits(label: float) -> None:
    label = torch.tensor(label).item()
    margins = torch.tensor([0.0, 1e-8, 1e-4, 0.3, 4.0, 60.0, -1e-8, -1e-4, -0.3, -4.0, -60.0], requires_grad=True)
    values = BradleyTerryLoss().per_pair(scores_of(margins, label))
    values.sum().backward()
    exact = lambda d: oracle.bradley_terry(d, label)  # noqa: E731
    for value, slope, margin in zip(values.tolist(), margins.grad.tolist(), margins.tolist(), strict=True):
        assert value == pytest.approx(float(exact(mpmath.mpf(margin))), rel=1e-5, abs=1e-7)
        expected = float(oracle.slope(exact, mpmath.mpf(margin)))
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("lead", [0.0, 1.0])
@pytest.mark.parametrize("label", [1.0, 0.7, 0.5, 0.0])
def test_finite_for_every_float32_margin(label: float, lead: float) -> None:
    margins = torch.tensor([LARGEST, -LARGEST, 1e6, -1e6, 0.0], requires_grad=True)
    scores = scores_of(margins, label)
    loss = BradleyTerryLoss(lead)
    loss(scores).backward()
    assert loss.per_pair(scores).float().isfinite().all()
    assert margins.grad.isfinite().all()


def test_margin_shifts_certain_pairs_and_spares_ties() -> None:
    margins = torch.tensor([-0.4, 0.0, 1.3])
    plain, led = BradleyTerryLoss(), BradleyTerryLoss(1.0)
    torch.testing.assert_close(led.per_pair(scores_of(margins)), plain.per_pair(scores_of(margins - 1.0)))
    torch.testing.assert_close(led.per_pair(scores_of(margins, 0.0)), plain.per_pair(scores_of(margins + 1.0, 0.0)))
    torch.testing.assert_close(led.per_pair(scores_of(margins, 0.5)), plain.per_pair(scores_of(margins, 0.5)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("d", [-2.0, 0.0, 1.5])
def test_pairs_ties_and_labels(d: float) -> None:
    """−log σ(x) = softplus(−x)."""
    margin, smoothing = 0.5, 0.2
    wins, loses = softplus(margin - d), softplus(margin + d)
    loss = TieLoss(margin=margin, tie_weight=3.0, label_smoothing=smoothing)
    found = loss.per_pair(scores_of(torch.tensor([d, d, d]), label=torch.tensor([1.0, 0.5, 0.75])))
    share = 0.75 * 0.8 + 0.25 * 0.2
    expected = [0.8 * wins + 0.2 * loses, 3 * (wins + loses), share * wins + (1 - share) * loses]
    assert found.tolist() == pytest.approx(expected)


def test_a_tie_is_least_at_equal_rewards() -> None:
    d = torch.zeros(1, requires_grad=True)
    tie = TieLoss(margin=3.0).per_pair(scores_of(d, label=0.5)).sum()
    tie.backward()
    assert tie.item() == pytest.approx(2 * softplus(3.0))
    assert d.grad.item() == pytest.approx(0.0)
