"""Frozen weights on several ranks: ranks with other weights are refused."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from latentreward.core.errors import InputError
from latentreward.reward.modules.training import share_frozen
from tests.distributed.ranks import on_ranks


def other_weights(folder: Path) -> str:
    """On two ranks, of which one has another frozen weight: the error."""
    rank = int(os.environ["LOCAL_RANK"])

    class Frozen(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(2, 2).requires_grad_(False)
            self.base.weight.fill_(rank)

        def setup(self, stage: str) -> None:
            share_frozen(self, self.trainer)

    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, default_root_dir=folder)
    with pytest.raises(InputError, match="the ranks have loaded different frozen weights") as caught:
        trainer.fit(Frozen())
    return str(caught.value)


@pytest.mark.slow
def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    assert len(set(on_ranks("tests.distributed.test_frozen:other_weights", tmp_path))) == 1
