"""``last.ckpt`` is at most n steps old, is there at the end of a run, and no state is written twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import LastCheckpoint
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from latentreward.apps.commands.fit_folder import last_checkpoint
from tests.callbacks.small_run import assert_same_state, make_trainer
from tests.callbacks.small_run import fit as fit_small


class Saves(Callback):
    """Number of optimiser steps at each save."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def fit(
    folder: Path, every: int, steps: int, batches: int = 5, resumed: Path | None = None, **options: Any
) -> list[int]:
    saves = Saves()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        callbacks=[LastCheckpoint(every), saves],
        **options,
    )
    trainer.fit(BoringModel(), DataLoader(torch.randn(batches, 32)), DataLoader(torch.randn(2, 32)), ckpt_path=resumed)
    return saves.steps


@pytest.mark.parametrize(
    ("every", "steps", "saved"),
    [
        (2, 12, [2, 4, 5, 6, 8, 10, 12]),
        (3, 7, [3, 5, 6, 7]),
        (5, 10, [5, 10]),
        (100, 7, [5, 7]),
        (1, 3, [1, 2, 3]),
    ],
)
def test_each_state_is_written_once(every: int, steps: int, saved: list[int], tmp_path: Path) -> None:
    assert fit(tmp_path, every, steps) == saved
    (file,) = tmp_path.rglob("*.ckpt")
    assert file.name == "last.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == steps


def test_validation_within_an_epoch_and_accumulation(tmp_path: Path) -> None:
    assert fit(tmp_path, 2, 5, batches=6, val_check_interval=2, accumulate_grad_batches=2) == [2, 3, 4, 5]


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    fit(tmp_path, 2, 7)
    (file,) = tmp_path.rglob("*.ckpt")
    assert fit(tmp_path, 3, 9, resumed=file) == [9]
    assert [*tmp_path.rglob("*.ckpt")] == [file]
    assert torch.load(file, weights_only=True)["global_step"] == 9


def test_a_resumed_run_saves_no_accumulated_gradients(tmp_path: Path) -> None:
    fit(tmp_path, 2, 4, batches=20, accumulate_grad_batches=2)
    (file,) = tmp_path.rglob("*.ckpt")
    assert fit(tmp_path, 2, 6, batches=20, accumulate_grad_batches=2, resumed=file) == [6]


def test_a_resumed_run_of_one_step_leaves_the_rest_of_its_epoch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_epochs=1)
    fit_small(whole)
    for steps, resumed in ((2, None), (3, "last"), (-1, "last")):
        trainer = make_trainer(tmp_path, [LastCheckpoint()], max_epochs=1, max_steps=steps)
        fit_small(trainer, last_checkpoint(trainer) if resumed else None)
    assert_same_state(whole, trainer)


def test_a_finished_run_is_not_saved_again(tmp_path: Path) -> None:
    fit(tmp_path, 2, 7)
    (file,) = tmp_path.rglob("*.ckpt")
    assert fit(tmp_path, 2, 7, resumed=file) == []


def test_a_trial_run_saves_nothing(tmp_path: Path) -> None:
    assert fit(tmp_path, 1, 7, fast_dev_run=3) == []


def test_a_new_run_keeps_the_file_of_an_earlier_one(tmp_path: Path) -> None:
    fit(tmp_path, 2, 7)
    fit(tmp_path, 2, 3)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert steps == {"last.ckpt": 7, "last-v1.ckpt": 3}
