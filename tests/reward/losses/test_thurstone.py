"""Thurstone's model: values and slopes against 50-digit arithmetic, tails, ties, refused constants."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from latentreward.reward import (
    ConstantVarianceThurstoneLoss,
    PreferenceLoss,
    ThurstoneLoss,
    comparison_std,
    log_ndtr,
    mixture_fidelity,
)
from tests.oracles import preference_losses as oracle
from tests.reward.losses.pairs import scores_of

MARGINS = [0.0, 1e-8, 1e-4, 0.03, 0.4, 1.0, 2.7, 8.0, 30.0, 1e3, 1e6]
MARGINS = [sign * value for value in MARGINS for sign in (1, -1)]
LABELS = [1.0, 0.9, 0.7, 0.5, 0.2, 0.0]
FLOAT32_MAX = torch.finfo(torch.float32).max

FORMS: list[tuple[PreferenceLoss, Callable]] = [
    (ThurstoneLoss("fidelity", "mixture"), oracle.mixture),
    (ThurstoneLoss("fidelity", "bhattacharyya"), oracle.bhattacharyya),
    (ThurstoneLoss("nll"), oracle.thurstone_nll),
]


def value_and_slope(loss: PreferenceLoss, margins: Tensor, label: float, sigma: float) -> tuple[Tensor, Tensor]:
    margins = margins.clone().requires_grad_()
    values = loss.per_pair(scores_of(margins, label, sigma))
    values.sum().backward()
    return values.detach(), margins.grad


def assert_as_exact(values: Tensor, slopes: Tensor, exact: list[tuple[float, float]]) -> None:
    for value, slope, (expected, expected_slope) in zip(values.tolist(), slopes.tolist(), exact, strict=True):
        assert abs(value - expected) <= 1e-5 * abs(expected) + 1e-7
        if abs(expected_slope) > 1e-30:
            assert abs(slope - expected_slope) <= 1e-4 * abs(expected_slope)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("loss", "formula"), FORMS, ids=["mixture", "bhattacharyya", "nll"])
def test_value_and_gradient_equal_50_digits(loss: ThurstoneLoss, formula: Callable, label: float, sigma: float) -> None:
    margins = torch.tensor(MARGINS)
    label = torch.tensor(label).item()  # as float32 holds it
    values, slopes = value_and_slope(loss, margins, label, sigma)

    def exact(margin: mpmath.mpf) -> mpmath.mpf:
        return formula(oracle.z_of(margin, sigma, sigma, loss.k, loss.sigma_u), label)

    pairs = [(float(exact(mpmath.mpf(m))), float(oracle.slope(exact, mpmath.mpf(m)))) for m in margins.tolist()]
    assert_as_exact(values, slopes, pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ndtr_and_its_gradient_hold_in_the_tail(dtype: torch.dtype) -> None:
    z = torch.tensor(
        [-1e6, -4000.0, -1000.0, -14.5, -5.0, -1.0, 0.0, 0.5, 3.0, 8.0, 11.0], dtype=dtype
    ).requires_grad_()
    log_p = log_ndtr(z)
    log_p.sum().backward()
    log_of = lambda x: mpmath.log1p(-oracle.ndtr(-x)) if x > 0 else mpmath.log(oracle.ndtr(x))  # noqa: E731
    for value, slope, at in zip(log_p.tolist(), z.grad.tolist(), z.tolist(), strict=True):
        assert value == pytest.approx(float(log_of(mpmath.mpf(at))), rel=2e-6)
        assert slope == pytest.approx(float(mpmath.npdf(at) / oracle.ndtr(mpmath.mpf(at))), rel=1e-5)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("form", ["mixture", "bhattacharyya"])
@pytest.mark.parametrize("sigma_u", [0.1, 1e-6])
def test_fidelity_is_finite_for_every_float32_margin(form: str, label: float, sigma_u: float) -> None:
    margins = torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 1e30, -1e30, 1e-45, 0.0])
    values, slopes = value_and_slope(ThurstoneLoss("fidelity", form, sigma_u=sigma_u), margins, label, 0.0)
    assert values.isfinite().all()
    assert slopes.isfinite().all()


@pytest.mark.parametrize("label", LABELS)
def test_nll_is_finite_up_to_a_million(label: float) -> None:
    values, slopes = value_and_slope(ThurstoneLoss("nll"), torch.tensor([1e6, -1e6]), label, 0.0)
    assert values.float().isfinite().all()
    assert slopes.isfinite().all()


@pytest.mark.parametrize(("margin", "sigma", "expected"), [(0.0, 0.5, 0.5), (1.0, 0.5, 0.838949)])
def test_win_probability_matches_hand_value(margin: float, sigma: float, expected: float) -> None:
    scores = scores_of(torch.tensor([margin]), sigmas=sigma)
    torch.testing.assert_close(ThurstoneLoss().win_probability(scores), torch.tensor([expected]))
    std = comparison_std(scores.chosen_sigmas, scores.rejected_sigmas)
    torch.testing.assert_close(log_ndtr(scores.margin.double() / std).exp().float(), torch.tensor([expected]))


def test_two_noise_levels_add_their_variances() -> None:
    chosen, rejected = torch.tensor([0.2]), torch.tensor([0.8])
    expected = math.sqrt(2 * 0.2**2 + 0.01 + 2 * 0.8**2 + 0.01)
    assert comparison_std(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)
    assert comparison_std(chosen, chosen).item() == pytest.approx(math.sqrt(2 * (2 * 0.04 + 0.01)), rel=1e-6)


def test_mixture_teaches_nothing_from_a_tie() -> None:
    values, slopes = value_and_slope(ThurstoneLoss(), torch.tensor(MARGINS), 0.5, 0.3)
    assert (slopes == 0).all()
    torch.testing.assert_close(values, torch.full_like(values, 1 - math.sqrt(0.5)))


def test_bhattacharyya_pulls_a_tie_to_equal_rewards() -> None:
    margins = torch.tensor([-2.0, -1e-3, 0.0, 1e-3, 2.0])
    values, slopes = value_and_slope(ThurstoneLoss(form="bhattacharyya"), margins, 0.5, 0.3)
    assert torch.equal(slopes.sign(), margins.sign())
    assert values[2] == pytest.approx(0, abs=1e-15)


def test_wrong_pairs_keep_their_gradient_where_the_released_form_has_lost_it() -> None:
    z = torch.tensor([-6.0, -14.5], requires_grad=True)
    mixture_fidelity(z, torch.tensor(1.0)).sum().backward()
    released = z.detach().clone().requires_grad_()
    (1 - torch.sqrt(0.5 * (1 + torch.erf(released / math.sqrt(2))) + 1e-6)).sum().backward()
    assert (z.grad < 0).all()
    assert released.grad[0] / z.grad[0] < 0.05
    assert released.grad[1] == 0


def test_constant_variance_ignores_the_noise_level() -> None:
    margins = torch.tensor([-1.0, 0.3, 2.0])
    loss = ConstantVarianceThurstoneLoss()
    torch.testing.assert_close(
        loss.per_pair(scores_of(margins, sigmas=0.0)), loss.per_pair(scores_of(margins, sigmas=0.9))
    )
    # variance 0.5 on both sides makes z the margin itself
    torch.testing.assert_close(loss.win_probability(scores_of(margins)), torch.special.ndtr(margins))
