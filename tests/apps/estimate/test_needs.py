"""The memory that trainings need is compared with what is there, and their hours are told."""

from dataclasses import replace

import pytest

from latentreward.apps.estimate.estimate import Card, TrainingNeeds, check_memory, told_hours
from latentreward.core.errors import InputError


def test_too_little_memory_is_refused_and_hours_are_told() -> None:
    small, large = TrainingNeeds(1, 36e15), TrainingNeeds(10**16, 360e15)
    told = check_memory({"train": small}, Card(False), "take less")
    assert told.startswith("memory: train 2.0 of ") and told.endswith("; to lower it: take less")
    with pytest.raises(InputError, match=r"memory: train needs 10000002.0 GB of memory, .* GB are here .*; take less"):
        check_memory({"train": large}, Card(False), "take less")
    with pytest.raises(InputError, match=r"GB of memory, .* GB are here"):  # a card says nothing of a run on the CPU
        check_memory({"train": large}, Card(False, card_gb=24), "take less")
    card = Card(True, card_gb=24, tflops=10)
    assert check_memory({"train": small}, card, "").startswith("memory: train 1.0 of 24.0 GB of GPU memory (counted")
    with pytest.raises(InputError, match=r"train needs 11000001.0 GB of GPU memory, 24.0 GB are given"):
        check_memory({"train": large}, card, "take less")
    with pytest.raises(InputError, match="card_gb=0 must be positive and finite"):
        Card(True, card_gb=0)
    assert told_hours({"train": small, "align": large}, card).startswith("hours: train 1, align 10 (computed, at")
    assert "train 1 per 1,000 steps" in told_hours({"train": replace(small, whole=False)}, card)
