"""From every checkpoint of a run, the resumed run is the rest of it."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentreward.callbacks import ExactResume
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from latentreward.core.checkpoints.files import DurableCheckpointIO
from latentreward.core.errors import InputError
from tests.callbacks.small_run import SmallModule, assert_same_state, fit, make_trainer, train_loader
from tests.marks import slow_after

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "validation in mid-epoch": {"val_check_interval": 2},
    "validation in mid-accumulation": {"val_check_interval": 3, "accumulate_grad_batches": 2},
    "validation by all batches": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "accumulation": {"accumulate_grad_batches": 3},
    "every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "by steps": {"max_steps": 12, "max_epochs": None, "val_check_interval": 2},
    "limited epochs": {"limit_train_batches": 5, "accumulate_grad_batches": 2, "val_check_interval": 2},
    "no validation": {"limit_val_batches": 0, "accumulate_grad_batches": 2},
}


class SaveAlways(Callback):
    """A checkpoint wherever Lightning's own or a user's callback may write one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[tuple[Path, int, int]] = []

    def save(self, trainer: Trainer, module: SmallModule, place: str) -> None:
        path = self.folder / f"{len(self.paths):03d}-{place}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append((path, len(module.seen), len(module.validated)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.save(trainer, pl_module, "batch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, pl_module, "epoch")


class Box:
    """A class of the user's own."""


class Remembering(Callback):
    """A callback whose state is what it was made with, from a step on."""

    def __init__(self, state: Any, step: int = 0) -> None:
        self.state, self.step, self.now = state, step, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.now = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"box": self.state} if self.now >= self.step else {}


@pytest.mark.parametrize("state", [Box(), lambda: 1, np.float64(1.0), {"a": [Path("a")]}])
@pytest.mark.parametrize("step", [0, 1])
def test_a_state_that_cannot_be_resumed_is_refused_before_training_or_as_it_is_saved(
    state: Any, step: int, tmp_path: Path
) -> None:
    saver, module = ModelCheckpoint(tmp_path, every_n_train_steps=2), SmallModule()
    trainer = make_trainer(tmp_path, [Remembering(state, step), saver], plugins=[DurableCheckpointIO()])
    with pytest.raises(
        InputError, match=r"^the state of Remembering cannot be resumed .*; let it hold tensors and plain"
    ):
        trainer.fit(module, train_loader())
    assert len(module.seen) == 2 * step and not list(tmp_path.glob("*.ckpt"))


def test_states_of_networks_and_data_modules_are_checked_and_plain_ones_are_taken(tmp_path: Path) -> None:
    plain = {"tensor": torch.ones(2), "list": [1, 2.0, None, "a", (True, {3})]}
    trainer = make_trainer(tmp_path, [Remembering(plain), ModelCheckpoint(tmp_path)], max_epochs=1)
    fit(trainer)
    module, data = SmallModule(), LightningDataModule()
    data.train_dataloader = train_loader
    data.state_dict = lambda: {"box": Box()}
    data.__class__ = type("Mine", (LightningDataModule,), {})
    with pytest.raises(InputError, match="state of Mine "):
        make_trainer(tmp_path).fit(module, data)
    module.net[0] = type("Linear", (nn.Linear,), {"get_extra_state": lambda self: Box()})(4, 8)
    with pytest.raises(InputError, match=r"state of net.0 \(get_extra_state\) .*test_exact_resume.Box"):
        make_trainer(tmp_path).fit(module, train_loader())


def run_saving_always(folder: Path, **options: Any) -> tuple[Trainer, SmallModule, SaveAlways]:
    saver = SaveAlways(folder)
    trainer = make_trainer(folder, [saver], enable_checkpointing=False, **options)
    return trainer, fit(trainer), saver


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(2, SETTINGS))
def test_every_checkpoint_leads_to_the_same_end(name: str, tmp_path: Path) -> None:
    whole, module, saver = run_saving_always(tmp_path, **SETTINGS[name])
    assert len(saver.paths) > 6
    accumulated = SETTINGS[name].get("accumulate_grad_batches", 1)
    for path, seen, validated in saver.paths:
        resumed = make_trainer(tmp_path, **SETTINGS[name])
        again = fit(resumed, path)
        assert_same_state(whole, resumed)
        taken = len(module.seen) - len(again.seen)
        assert seen - accumulated < taken <= seen, path
        assert again.seen == module.seen[taken:], path
        assert again.validated == module.validated[len(module.validated) - len(again.validated) :], path
        assert len(module.validated) - len(again.validated) <= validated, path


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_checkpoints_of_a_resumed_run_lead_there_too(name: str, tmp_path: Path) -> None:
    whole, module, saver = run_saving_always(tmp_path / "whole", **SETTINGS[name])
    for path, _, _ in saver.paths[2::3]:
        second = SaveAlways(tmp_path / path.stem)
        fit(make_trainer(tmp_path, [second], enable_checkpointing=False, **SETTINGS[name]), path)
        for later in [saved for saved, _, _ in second.paths[:4]]:
            resumed = make_trainer(tmp_path, **SETTINGS[name])
            again = fit(resumed, later)
            assert_same_state(whole, resumed)
            assert again.seen == module.seen[len(module.seen) - len(again.seen) :], (path, later)


@pytest.mark.slow
def test_workers_prefetch_and_nothing_is_lost(tmp_path: Path) -> None:
    whole, module, saver = run_saving_always(tmp_path, val_check_interval=2)
    for path, seen, _ in saver.paths[3::7]:
        resumed = make_trainer(tmp_path, val_check_interval=2)
        again = fit(resumed, path, workers=2)
        assert_same_state(whole, resumed)
        assert again.seen == module.seen[seen:]


@pytest.mark.slow
def test_lightnings_own_checkpoints_by_step_and_by_validation(tmp_path: Path) -> None:
    keepers = [ModelCheckpoint(tmp_path, f"{n}-{{step}}", every_n_train_steps=n, save_top_k=-1) for n in (1, 3)]
    keepers.append(ModelCheckpoint(tmp_path, "val-{step}", monitor="val/loss", save_top_k=-1))
    options = {"val_check_interval": 3, "accumulate_grad_batches": 2}
    whole = make_trainer(tmp_path, keepers, **options)
    fit(whole)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) > 10
    for path in paths:
        resumed = make_trainer(tmp_path, **options)
        fit(resumed, path)
        assert_same_state(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 8])
def test_another_batch_size_goes_on_with_the_unused_rows(batch_size: int, tmp_path: Path) -> None:
    _, module, saver = run_saving_always(tmp_path)
    for path, seen, _ in saver.paths:
        resumed = make_trainer(tmp_path)
        again = fit(resumed, path, batch_size=batch_size)
        for epoch in range(2):
            rows = [row for at, batch in module.seen[:seen] + again.seen if at == epoch for row in batch]
            assert sorted(rows) == list(range(26)), path
        last_epoch = [batch for at, batch in again.seen if at == 1]
        if seen <= 7:
            assert len(last_epoch) == -(-26 // batch_size)


def test_ranks_draw_unlike_numbers() -> None:
    drawn = []
    for rank in (0, 1, 0):
        trainer: Any = SimpleNamespace(global_step=3, global_rank=rank, current_epoch=0)
        ExactResume(seed=0).on_train_batch_start(trainer, SmallModule(), None, 3)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_global_generators_depend_on_the_step_and_not_on_what_was_drawn(tmp_path: Path) -> None:
    class Draw(Callback):
        def __init__(self, disturb: bool) -> None:
            self.disturb, self.drawn = disturb, []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
            if self.disturb:
                torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002

    logs = []
    for disturb in (False, True):
        draw = Draw(disturb)
        fit(make_trainer(tmp_path, [draw], enable_checkpointing=False))
        logs.append(draw.drawn)
    assert logs[0] == logs[1]
    assert len(set(logs[0])) == len(logs[0])
