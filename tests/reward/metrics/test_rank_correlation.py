"""Correlations of scores against torchmetrics, double loops and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from latentreward.core.errors import InputError
from latentreward.reward import ScoreCorrelation
from latentreward.reward.metrics.rank_correlation import average_ranks, clustered_correlation, same_order
from tests.reward.losses.two_ranks import on_ranks

ORACLES = {"spearman": spearman_corrcoef, "pearson": pearson_corrcoef}


def related(number: int, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=number)
    y = 0.6 * x + 0.8 * rng.normal(size=number)
    return (x.round(1), y.round(0)) if ties else (x, y)


def test_ranks_equal_a_double_loop() -> None:
    values = np.random.default_rng(0).integers(0, 7, 40).astype(float)
    ranks = [1 + (values < value).sum() + ((values == value).sum() - 1) / 2 for value in values]
    np.testing.assert_array_equal(average_ranks(values), ranks)


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("ties", [False, True])
def test_equals_torchmetrics(kind, ties) -> None:
    x, y = related(300, ties=ties)
    expected = ORACLES[kind](torch.from_numpy(x), torch.from_numpy(y)).item()
    assert clustered_correlation(x, y, np.arange(300), kind).value == pytest.approx(expected, abs=1e-6)
    metric = ScoreCorrelation(kind)
    for part in np.array_split(np.arange(300), 4):
        metric.update(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def correlation_on_a_rank(rank: int, kind: str) -> list[float]:
    """What one of two ranks computes: it has seen 200 or 100 of the 300 images, or none at all."""
    x, y = (torch.from_numpy(scores) for scores in related(300))
    metric, empty = ScoreCorrelation(kind), ScoreCorrelation(kind)
    for part in np.array_split(np.arange(300), 3)[rank::2]:
        metric.update(x[part], y[part])
    return [metric.compute().item(), empty.compute().item()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ORACLES)
def test_ranks_know_all_images(kind, tmp_path: Path) -> None:
    value = clustered_correlation(*related(300), np.arange(300), kind).value
    for found in on_ranks("tests.reward.metrics.test_rank_correlation:correlation_on_a_rank", kind, tmp_path):
        assert found == pytest.approx([value, float("nan")], abs=1e-6, nan_ok=True)


def test_large_offsets_lose_no_digits() -> None:
    x, y = related(300)
    shifted = clustered_correlation(1e6 + 1e-3 * x, y, np.arange(300), "pearson")
    assert shifted == pytest.approx(clustered_correlation(x, y, np.arange(300), "pearson"), abs=1e-5)


def test_ranks_alone_matter_to_spearman() -> None:
    x, y = related(200)
    value = clustered_correlation(np.exp(3 * x), y**3, np.arange(200), "spearman").value
    assert value == pytest.approx(clustered_correlation(x, y, np.arange(200), "spearman").value)
    assert clustered_correlation(x, -np.exp(x), np.arange(200), "spearman").value == pytest.approx(-1)


def test_interval_of_pearson_is_fishers() -> None:
    x, y = related(3000, seed=1)
    value, low, high, _ = clustered_correlation(x, y, np.arange(3000), "pearson")
    ends = np.tanh(np.arctanh(value) + np.array([-1.96, 1.96]) / np.sqrt(2997))
    np.testing.assert_allclose([low, high], ends, atol=0.004)


def test_spearmans_ends_are_those_of_ranking_anew() -> None:
    x, y = related(400, seed=2)
    _, low, high, _ = clustered_correlation(x, y, np.arange(400), "spearman")
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1500):
        rows = rng.integers(400, size=400)
        values.append(np.corrcoef(average_ranks(x[rows]), average_ranks(y[rows]))[0, 1])
    np.testing.assert_allclose([low, high], np.percentile(values, [2.5, 97.5]), atol=0.012)


@pytest.mark.parametrize("kind", ORACLES)
def test_edge_cases(kind) -> None:
    x, y = related(50)
    with_nan = np.concatenate([x, [np.nan, 3.0]]), np.concatenate([y, [1.0, np.nan]])
    groups = np.arange(52)
    assert clustered_correlation(*with_nan, groups, kind) == clustered_correlation(x, y, groups[:50], kind)
    assert np.isnan(clustered_correlation(np.full(50, 0.1), y, groups[:50], kind)[:3]).all()
    assert np.isnan(clustered_correlation(x[:0], y[:0], groups[:0], kind)[:3]).all()
    assert np.isnan(clustered_correlation(x[:1], y[:1], groups[:1], kind)[:3]).all()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_without_images_and_of_unknown_kind() -> None:
    assert ScoreCorrelation().compute().isnan()
    with pytest.raises(InputError, match="ScoreCorrelation: kind='kendall' is not known"):
        ScoreCorrelation("kendall")  # type: ignore[arg-type]


def test_same_order() -> None:
    gap, other = np.array([1.0, -1.0, 0.0, 0.0, 2.0, np.nan]), np.array([3.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(same_order(gap, other), [1, 0, 1, 0, 0, np.nan])
