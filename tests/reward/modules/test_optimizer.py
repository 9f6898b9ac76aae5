"""Learning rates by optimiser step, found ones too, and weights that get no gradient."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import ResumedSettings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from latentreward.core.contracts import Features, FeatureSpec
from latentreward.reward import LRMModule, RewardHead, WarmupSchedule
from tests.alignment.modules.batches import lrm, pixel_batch
from tests.alignment.modules.lpo_runs import loaders, lpo
from tests.diffusion.backbones.networks import tiny_backbone
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


def rates_of(steps: int, **options: object) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupSchedule(optimizer, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup_steps": 2, "decay": "linear", "total_steps": 6}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"warmup_steps": 2, "decay": "cosine", "total_steps": 6}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"decay": "linear", "total_steps": 2}, [1, 0.5, 0]),
    ],
    ids=str,
)
def test_rates(options: dict, expected: list[float]) -> None:
    assert rates_of(len(expected), **options) == pytest.approx(expected, abs=1e-5)


class CutHead(RewardHead):
    """Two layers; a detached tensor between them leaves the first one without a gradient."""

    def __init__(self, spec: FeatureSpec, cut: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(spec.visual[0].width, 4), nn.Linear(4, 1)
        nn.init.zeros_(self.second.weight)  # as an adapter's B: the first layer's gradient is zero, but there
        self.cut = cut

    def forward(self, features: Features) -> Tensor:
        hidden = self.first(features.visual[0].mean(dim=1))
        return self.second(hidden.detach() if self.cut else hidden).squeeze(-1)


def told(**options: Any) -> list[str]:
    """Warnings about gradients in a run of three batches, of which two make a step."""
    torch.manual_seed(0)
    backbone = tiny_backbone("sd15").requires_grad_(False)
    module = LRMModule(backbone, lambda spec: CutHead(spec, **options), eval_timesteps=[1], seed=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=2, accumulate_grad_batches=2, enable_checkpointing=False, **quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader([pixel_batch()] * 4, batch_size=None))
    return [str(one.message) for one in caught if "gradient" in str(one.message)]


def test_weights_without_a_gradient_are_told_once_with_their_module() -> None:
    (line,) = told()
    assert line.startswith(
        "LRMModule: 2 of 4 trained weights got no gradient in the first step, such as those of "
        "model.head.first (Linear)"
    )
    assert "\n" not in line


def test_weights_whose_gradient_is_zero_are_not_told() -> None:
    assert told(cut=False) == []
