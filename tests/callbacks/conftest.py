"""A small real reward module and pairs of noise images, for callbacks to watch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from latentreward.core.contracts import PreferenceBatch
from latentreward.diffusion import LoRA, sd35_tiny
from latentreward.reward import DiNaLRMModule


def make_batch(index: int, size: int = 4) -> PreferenceBatch:
    generator = torch.Generator().manual_seed(index)
    images = torch.rand(2, size, 3, 32, 32, generator=generator) * 2 - 1
    names = tuple(f"pair-{index}-{row}" for row in range(size))
    return PreferenceBatch(
        pair_ids=names,
        prompts=("a red circle on a black background",) * size,
        chosen=images[0],
        rejected=images[1],
        chosen_keys=tuple(f"{name}-a" for name in names),
        rejected_keys=tuple(f"{name}-b" for name in names),
        label=torch.tensor([1.0, 1.0, 0.5, 1.0])[:size],
        weight=torch.ones(size),
    )


@pytest.fixture
def batches() -> list[PreferenceBatch]:
    return [make_batch(index) for index in range(6)]


@pytest.fixture
def module() -> DiNaLRMModule:
    seed_everything(0)
    backbone = sd35_tiny(num_layers=2, visual_taps=(1, 2), text_taps=(1, 2), tuning="lora", lora=LoRA(rank=2, alpha=4))
    return DiNaLRMModule(backbone, eval_sigmas=(0.2, 0.8), ensemble_sigmas=())


@pytest.fixture
def loader() -> Callable[[list[PreferenceBatch]], DataLoader]:
    return lambda batches: DataLoader(batches, batch_size=None)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **options})

    return make
