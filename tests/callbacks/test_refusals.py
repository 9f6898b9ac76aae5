"""What callbacks refuse: their settings, and modules that they have nothing to do with."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import (
    CollapseGuard,
    HackingMonitor,
    LastCheckpoint,
    NaNGuard,
    PolicyLoRA,
    SampleGrid,
    ScoredPairGrid,
    TimestepBands,
    TrainableEMA,
)

from latentreward.core.errors import InputError
from latentreward.reward import CallableScorer
from tests.callbacks.small_run import fit, make_trainer

PROMPTS = ["a red circle", "two blue squares"]
LOOK = CallableScorer(lambda texts, images: torch.zeros(len(images)), name="look")
ROWS: list[tuple[Callable[[], Any], str]] = [
    (lambda: NaNGuard(every_n_batches=0), "every_n_batches is 0"),
    (lambda: TrainableEMA(decay=math.nan), "decay=nan"),
    (lambda: ScoredPairGrid(num_pairs=0), "num_pairs is 0"),
    (lambda: LastCheckpoint(0), "every_n_train_steps is 0"),
    (lambda: SampleGrid([]), "prompts of SampleGrid"),
    (lambda: SampleGrid("no/such.txt"), "SampleGrid.prompts: no/such.txt"),
    (lambda: SampleGrid(PROMPTS, every_n_steps=0), "SampleGrid.every_n_steps is 0"),
    (lambda: SampleGrid(PROMPTS, columns=0), "SampleGrid.columns is 0"),
    (lambda: HackingMonitor(PROMPTS[:1], LOOK), "at least 2 prompts"),
    (lambda: HackingMonitor(PROMPTS, LOOK, tolerance=0.0), "tolerance=0"),
    (lambda: HackingMonitor(PROMPTS, LOOK, reward_sigmas=(2.0,)), "HackingMonitor.reward_sigmas=[2.0]"),
    (lambda: CollapseGuard(PROMPTS, images_per_prompt=1), "images_per_prompt=1"),
    (lambda: CollapseGuard(PROMPTS, least=1.0), "least=1"),
    (lambda: TimestepBands((5, 1)), "edges=[5, 1]"),
]


def test_a_setting_is_named_in_one_line() -> None:
    for make, key in ROWS:
        with pytest.raises(InputError) as caught:
            make()
        assert key in str(caught.value) and "\n" not in str(caught.value), (key, caught.value)


@pytest.mark.parametrize("callback", [PolicyLoRA(), SampleGrid(PROMPTS)], ids=type)
def test_another_kind_of_module_is_named(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SmallModule"):
        fit(make_trainer(tmp_path, [callback], max_epochs=1))
