"""The rate that Lightning's learning rate finder finds is the one that trains, under a schedule too."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from latentreward.callbacks import ResumedSettings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim import AdamW
from torch.utils.data import DataLoader

from latentreward.reward import WarmupSchedule
from tests.alignment.modules.batches import lrm, pixel_batch
from tests.alignment.modules.lpo_runs import loaders, lpo
from tests.marks import rotated_after
from tests.small_user import SteppedUserModule

GIVEN = 1e-5
SEARCH = {"min_lr": 1e-4, "max_lr": 1e-2, "early_stop_threshold": None}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Rates(Callback):
    """Learning rates of a run's batches."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def lrm_data() -> dict[str, Any]:
    return {"train_dataloaders": DataLoader([pixel_batch(2)] * 40, batch_size=None)}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("as_callback", rotated_after(1, [False, True]))
@pytest.mark.parametrize(
    ("make", "data"), rotated_after(1, [(lrm, lrm_data), (lpo, lambda: {"datamodule": loaders()})]), ids=["lrm", "lpo"]
)
def test_a_found_rate_trains(
    make: Callable[..., LightningModule], data: Callable[[], dict[str, Any]], as_callback: bool, tmp_path: Path
) -> None:
    schedule = partial(WarmupSchedule, warmup_steps=2)
    module, rates = make(optimizer=partial(AdamW, lr=GIVEN), lr_scheduler=schedule), Rates()
    finder = [LearningRateFinder(num_training_steps=14, **SEARCH)] if as_callback else []
    callbacks = [*finder, rates, ResumedSettings()]
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=callbacks, default_root_dir=tmp_path, **QUIET)
    if not as_callback:
        Tuner(trainer).lr_find(module, num_training=14, **SEARCH, **data())
    trainer.fit(module, **data())
    assert module.lr is not None and 1e-4 <= module.lr <= 1e-2
    assert rates.seen == pytest.approx([module.lr / 2, module.lr, module.lr, module.lr])
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {module.lr}


def test_without_a_search_the_optimisers_own_rate_trains() -> None:
    optimizer = SteppedUserModule(optimizer=partial(AdamW, lr=GIVEN)).configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == GIVEN
