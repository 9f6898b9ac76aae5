"""Accuracy within prompt groups against a double loop."""

import pytest
import torch

from latentreward.reward import GroupPairAccuracy


def count(scores: list[float], ranks: list[int], groups: list[int]) -> tuple[int, int]:
    correct = total = 0
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if groups[i] == groups[j]:
                total += 1
                up = scores[i] > scores[j] and ranks[i] < ranks[j]
                correct += up or (scores[i] < scores[j] and ranks[i] > ranks[j])
    return correct, total


def test_equals_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40,), generator=generator).float()
    ranks = torch.randint(0, 4, (40,), generator=generator)
    groups = torch.randint(0, 6, (40,), generator=generator)
    metric = GroupPairAccuracy()
    metric.update(scores, ranks, groups)
    correct, total = count(scores.tolist(), ranks.tolist(), groups.tolist())
    assert (int(metric.mean_value), int(metric.weight)) == (correct, total)
    assert metric.compute().item() == pytest.approx(correct / total)


def test_order_of_images_does_not_matter() -> None:
    scores, ranks = torch.tensor([0.1, 0.7, 0.7, -2.0]), torch.tensor([2, 1, 3, 4])
    values = []
    for order in (torch.arange(4), torch.tensor([3, 1, 0, 2])):
        metric = GroupPairAccuracy()
        metric.update(scores[order], ranks[order])
        values.append(metric.compute())
    assert values[0] == values[1] == pytest.approx(4 / 6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_pair_is_nan() -> None:
    metric = GroupPairAccuracy()
    assert metric.compute().isnan()
    metric.update(torch.ones(3), torch.arange(3), torch.arange(3))
    assert metric.compute().isnan()
