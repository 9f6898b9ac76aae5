import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from latentreward.data import PairBatchSampler
from latentreward.data.loading import ResumableLoader


def loader(workers: int = 0, rows: int = 22, batch_size: int = 4, **shares: int) -> ResumableLoader:
    sampler = PairBatchSampler(rows, batch_size, **shares, seed=2)
    return ResumableLoader(list(range(rows)), sampler, collate_fn=torch.tensor, num_workers=workers)  # type: ignore[arg-type]


def batches(iterator: Iterator[Any], count: int = 1000) -> list[list[int]]:
    return [batch.tolist() for _, batch in zip(range(count), iterator, strict=False)]


@pytest.mark.parametrize("workers", [0, 2])
def test_delivered_batches_count_and_prefetched_ones_do_not(workers: int) -> None:
    whole = batches(iter(loader()))
    first = loader(workers)
    assert first.state_dict() == {"epoch": 0, "used": 0, "rows": 22, "seed": 2, "shuffle": True}
    iterator = iter(first)
    assert batches(iterator, 2) == whole[:2]
    assert first.state_dict()["used"] == 8
    assert first.state_dict(undo=1)["used"] == 4
    second = loader(workers)
    second.load_state_dict(first.state_dict())
    assert len(second) == 6
    assert second.places.remaining() == 4
    assert second.state_dict() == first.state_dict()
    assert batches(iter(second)) == whole[2:]
    assert second.state_dict()["used"] == 22
    second.sampler.set_epoch(1)
    assert second.state_dict() == {**first.state_dict(), "epoch": 1, "used": 0}
    assert len(batches(iter(second))) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_is_that_of_the_first_batch_not_of_the_iterator(workers: int) -> None:
    expected = loader()
    expected.sampler.set_epoch(3)
    late = loader(workers)
    iterator = iter(late)  # Lightning makes one before it sets the epoch
    late.sampler.set_epoch(3)
    assert batches(iterator) == batches(iter(expected))
    assert late.state_dict()["epoch"] == 3


@patch.dict(os.environ)  # where DDP leaves its rank to the tests that follow
def test_lightning_leaves_shares_and_state_alone() -> None:
    class Steps(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.orders: list[list[int]] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.orders.append(batch.tolist())
            return self.layer(batch[:, None].float()).sum() * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    train = loader(rows=9, batch_size=2)
    assert isinstance(train.sampler, DistributedSampler)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Steps()
    trainer.fit(module, train)
    assert trainer.train_dataloader is train
    epochs = [list(chain(*module.orders[:5])), list(chain(*module.orders[5:]))]
    assert [sorted(order) for order in epochs] == [list(range(9))] * 2
    assert epochs[0] != epochs[1]
    assert trainer.fit_loop.state_dict()["state_dict"]["combined_loader"] == [train.state_dict()]


@pytest.mark.slow
def test_a_killed_worker_is_one_line() -> None:
    train = loader(workers=2, rows=200, batch_size=2)
    iterator = iter(train)
    batches(iterator, 3)
    assert train._iterator is not None
    os.kill(train._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"worker process was killed \(perhaps memory ran out: set num_workers"):
        batches(iterator)


def test_workers_outlive_signals_meant_for_the_run() -> None:
    train = loader(workers=2, rows=200, batch_size=2)
    iterator = iter(train)
    seen = Counter(chain(*batches(iterator, 3)))
    assert train._iterator is not None
    for worker in train._iterator._workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker.pid, number)
    seen.update(chain(*batches(iterator)))
    assert seen == Counter(range(200))
    assert isinstance(train, DataLoader)
