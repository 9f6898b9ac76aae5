"""Two processes do what one does with all pairs: same weights, no parameter without gradient, no hang."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import distributed
from torch.optim import SGD
from torch.utils.data import DataLoader, Sampler

from latentreward.data.collate import collate_pairs
from latentreward.losses import LRMLoss
from latentreward.modules import RewardModule
from tests.modules.batches import dina, dina_head, loaded_pairs, lrm

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs gloo")


class EveryNth(Sampler[int]):
    """Rank r of n takes items r, r + n, …, so the ranks' batches together are one process's batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        return iter(range(rank, self.count, world))

    def __len__(self) -> int:
        return self.count // (distributed.get_world_size() if distributed.is_initialized() else 1)


def sgd(groups: object) -> SGD:
    return SGD(groups, lr=0.01)


MAKERS: dict[str, Callable[[], RewardModule]] = {
    "lrm both": lambda: lrm("sd15", loss=LRMLoss("both"), optimizer=sgd),
    "lrm sdxl": lambda: lrm("sdxl", loss=LRMLoss("both"), optimizer=sgd, backbone={"tuning": "lora"}),
    "lrm on dit": lambda: lrm("sd35", optimizer=sgd),
    "dina": lambda: dina("sd35", optimizer=sgd, backbone={"text_taps": (1,), "gradient_checkpointing": True}),
    "dina on unet": lambda: dina("sd15", dina_head, optimizer=sgd),
}


def run(
    make: Callable[[], RewardModule], processes: int, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after two steps on eight pairs, and metrics over them."""
    module = make()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    data = DataLoader(loaded_pairs(8), 4 // processes, sampler=EveryNth(8), collate_fn=collate_pairs)
    trainer.fit(module, data, data)
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return weights, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    start = {n: p.detach().clone() for n, p in MAKERS[name]().named_parameters()}
    one, one_metrics = run(MAKERS[name], 1, tmp_path)
    two, two_metrics = run(MAKERS[name], 2, tmp_path)
    assert one.keys() == two.keys()
    for key, weights in one.items():
        torch.testing.assert_close(two[key], weights, rtol=1e-5, atol=1e-5)
    assert max((weights - start[key]).abs().max() for key, weights in one.items()) > 5e-4
    for key, value in one_metrics.items():
        if key.startswith("val/") and "loss" not in key:
            assert two_metrics[key] == pytest.approx(value, abs=1e-4)
