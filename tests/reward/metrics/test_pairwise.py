"""Accuracy and margin of pairs: hand values, ties, exchanged sides, nothing seen, bands of noise levels."""

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from latentreward.reward import MeanMargin, PairwiseAccuracy

CHOSEN = torch.tensor([1.0, 0.0, 2.0, 3.0, 5.0])
REJECTED = torch.tensor([0.5, 1.0, 2.0, 3.5, 0.0])
LABEL = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.5])


def value_of(metric: Metric, *columns: Tensor) -> float:
    metric.update(*columns)
    return metric.compute().item()


@pytest.mark.parametrize(("equal", "expected"), [("wrong", 1 / 3), ("half", 0.5)])
def test_accuracy_by_hand(equal: str, expected: float) -> None:
    assert value_of(PairwiseAccuracy(equal), CHOSEN, REJECTED, LABEL) == pytest.approx(expected)


def test_margin_by_hand() -> None:
    assert value_of(MeanMargin(), CHOSEN, REJECTED, LABEL) == pytest.approx((0.5 - 1.0 + 0.0) / 3)


@pytest.mark.parametrize("metric", [PairwiseAccuracy(), PairwiseAccuracy("half"), MeanMargin()], ids=str)
def test_exchanging_all_sides_changes_nothing(metric: Metric) -> None:
    expected = value_of(metric.clone(), CHOSEN, REJECTED, LABEL)
    assert value_of(metric.clone(), REJECTED, CHOSEN, 1 - LABEL) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [PairwiseAccuracy(), MeanMargin()], ids=str)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_decided_is_nan(metric: Metric) -> None:
    assert metric.clone().compute().isnan()
    assert torch.tensor(value_of(metric.clone(), CHOSEN, REJECTED, torch.full((5,), 0.5))).isnan()


def test_every_output_column_is_a_comparison() -> None:
    chosen = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    rejected = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert value_of(PairwiseAccuracy(), chosen, rejected, torch.ones(2)) == 0.5
    assert value_of(MeanMargin(), chosen, rejected, torch.ones(2)) == pytest.approx((1 - 1 - 1 + 2) / 4)


def test_batches_add_up() -> None:
    metric = PairwiseAccuracy()
    for rows in (slice(0, 2), slice(2, 5)):
        metric.update(CHOSEN[rows], REJECTED[rows], LABEL[rows])
    assert metric.compute().item() == pytest.approx(1 / 3)
