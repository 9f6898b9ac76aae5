"""A small checkpoint goes with its base in any precision, and with no other."""

from pathlib import Path

import pytest
import torch
from latentreward.callbacks import TrainableCheckpoint
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from latentreward.core.checkpoints.base_weights import BaseSample
from latentreward.core.errors import InputError
from latentreward.data import collate_pairs
from latentreward.reward.modules.sharding import shard
from tests.alignment.modules.batches import dina, loaded_pairs, lrm
from tests.marks import slow_after


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_known_again_in_any_precision(dtype: torch.dtype) -> None:
    record = BaseSample.of(network(), "here").record(())
    assert len(record["names"]) == 4
    BaseSample.of(network().to(dtype), "there").check(record)


def test_another_base_is_named() -> None:
    record = BaseSample.of(network(), "org/base@v1").record(())
    with pytest.raises(InputError, match=r"base org/base@v1, whose 0\.weight differs from that of /data/other"):
        BaseSample.of(network(1), "/data/other").check(record)


def test_weights_that_the_checkpoint_holds_itself_are_not_compared() -> None:
    record = BaseSample.of(network(), "here").record(network().state_dict())
    BaseSample.of(network(1), "there").check(record)


def trainer(folder: Path, *callbacks: ModelCheckpoint) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[TrainableCheckpoint(), *callbacks],
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", slow_after(1, [False, True]))
def test_a_run_refuses_the_checkpoint_of_another_base(weights_only: bool, tmp_path: Path) -> None:
    data = DataLoader(loaded_pairs(2), 2, collate_fn=collate_pairs)
    saver = ModelCheckpoint(tmp_path, "small", save_weights_only=weights_only)
    module = dina("sd35_no_t5")
    trainer(tmp_path, saver).fit(module, data)
    content = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(module.state_dict()) > len(content["state_dict"])  # whole again after the run
    assert content["base"]["source"] == module.model.backbone.source
    other = dina("sd35_no_t5")
    with torch.no_grad():
        for parameter in other.model.backbone.transformer.parameters():
            parameter.mul_(1 if parameter.requires_grad else 1.1)
    trainer(tmp_path).validate(dina("sd35_no_t5"), data, str(tmp_path / "small.ckpt"), verbose=False, weights_only=True)
    with pytest.raises(InputError, match=r"belongs to the base .*set source to"):
        trainer(tmp_path).validate(other, data, str(tmp_path / "small.ckpt"), verbose=False, weights_only=True)


def test_a_scalar_that_fsdp2_cannot_share_out_is_named() -> None:
    module = lrm("sd15")
    module.model.head.extra = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match=r"parameter model\.head\.extra is a scalar"):
        shard(module, module.model.backbone, mesh=None)
