"""An estimate says what the real step takes: FLOPs exactly, memory for the backward pass within 5 %."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from latentreward.estimate.costs import StepCosts, step_costs
from latentreward.estimate.shapes import SavedTensors
from tests.modules import batches

PIXELS = 16
PAIRS = Namespace(
    class_path="latentreward.data.PreferenceDataModule", init_args=Namespace(batch_size=4, size=PIXELS)
)


def ready(module: LightningModule, precision: str = "32-true") -> LightningModule:
    """A module that knows its trainer."""
    module.trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module.log = module.log_dict = lambda *_, **__: None
    return module


def measured(module: LightningModule, batch: Any) -> tuple[int, int]:
    """FLOPs of a real step, and bytes that it keeps for its backward pass."""
    ready(module).train()
    with FlopCounterMode(display=False) as counter:
        with (saved := SavedTensors([*module.parameters(), *module.buffers()])):
            result = module.training_step(batch, 0)
        (result["loss"] if isinstance(result, Mapping) else result).backward()
    return counter.get_total_flops(), saved.bytes.peak


def computed(module: LightningModule, data: Namespace) -> StepCosts:
    """The estimate for the same module without weights."""
    return step_costs(ready(module), data, gpu=False)


@pytest.mark.parametrize("kind", ["lrm", "dina"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward_module(kind: str, checkpointing: bool) -> None:
    options = {"backbone": {"gradient_checkpointing": checkpointing}}
    real = batches.MODULES[kind](**options)
    with torch.device("meta"):
        unread = batches.MODULES[kind](**options)
    costs = computed(unread, PAIRS)
    batch = batches.pixel_batch(4, labels=(1.0,))
    batch = batches.replace(batch, prompts=tuple(f"prompt {n}" for n in range(4)))
    flops, saved = measured(real, batch)
    print(kind, checkpointing, flops, costs.forward + costs.backward, saved, costs.saved)
    assert costs.forward + costs.backward == flops
    assert costs.saved == pytest.approx(saved, rel=0.05)
