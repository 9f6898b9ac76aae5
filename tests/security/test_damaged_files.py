"""Every file that is stored tells that its bytes were changed, with one line, before what it holds is used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint

from latentreward.core.checkpoints.files import newest_intact
from latentreward.core.checkpoints.shards import INDEX, INDEX_HASH, REST, read_checkpoint
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import file_hash
from latentreward.core.storage.run_folder import WRITERS
from latentreward.data.score_table import read_table
from latentreward.diffusion.cache import store
from latentreward.reward import RewardModel
from latentreward.reward.scoring.layouts.model_folder import PretrainedReward
from tests.alignment.rewards.stored import write_run
from tests.diffusion.cache.written_caches import write_cache
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeroed(data: bytes) -> bytes:
    middle, part = len(data) // 2, max(1, len(data) // 16)
    return data[:middle] + bytes(part) + data[middle + part :]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (truncated, zeroed, flipped)


def load_model(folder: Path) -> None:
    PretrainedReward(folder, pipeline_folder("sd35" if "dina" in folder.name else "sd15")).load(RewardModel)


def check(folder: Path) -> None:
    for file in store.files_of(folder):
        store.check_file(folder, store.read_plan(folder), file)


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("last.ckpt", read_checkpoint),
    "run": ("dina_run/reward.ckpt", lambda path: RewardModel.from_pretrained(path.parent)),
    "shard": ("shards/__0_0.distcp", lambda path: read_checkpoint(path.parent)),
    "index": (f"shards/{INDEX}", lambda path: read_checkpoint(path.parent)),
    "values beside shards": (f"shards/{REST}", lambda path: read_checkpoint(path.parent)),
    "head": ("dina/head.safetensors", lambda path: load_model(path.parent)),
    "backbone": ("lrm/backbone.safetensors", lambda path: load_model(path.parent)),
    "LoRA": ("dina/adapter/adapter_model.safetensors", lambda path: load_model(path.parents[1])),
    "cache": ("cache", lambda path: check(path.parent)),
    "table": ("table.parquet", read_table),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    torch.save(
        {"state_dict": {f"{n}": torch.randn(500) for n in range(9)}, "optimizer_states": []}, folder / "last.ckpt"
    )
    distributed_checkpoint.save({"state_dict": {"w": torch.randn(5000)}}, checkpoint_id=folder / "shards", no_dist=True)
    torch.save({"callbacks": {"average": torch.randn(5000)}}, folder / "shards" / REST)
    (folder / "shards" / INDEX_HASH).write_text(file_hash(folder / "shards" / INDEX))
    write_run(folder / "dina_run", "dina", "sd35", lora={"rank": 2, "alpha": 3.0}, tuning="lora")
    write_run(folder / "lrm_run", "lrm", "sd15")
    for name, base in (("dina", "sd35"), ("lrm", "sd15")):
        RewardModel.from_pretrained(folder / f"{name}_run").save_pretrained(folder / name, base=pipeline_folder(base))
    table = pa.table({"pair_id": [f"{n}" for n in range(99)], "score": np.random.default_rng(0).normal(size=99)})
    with WRITERS[".parquet"](folder / "table.parquet", table.schema) as writer:
        writer.write_table(table)
    return folder


@pytest.mark.parametrize(
    ("kind", "damage"), slow_after(3, [(kind, damage) for damage in reversed(DAMAGES) for kind in KINDS])
)
def test_damage_is_noticed(kind: str, damage: Callable[[bytes], bytes], stored: Path, tmp_path: Path) -> None:
    name, load = KINDS[kind]
    path = tmp_path / name
    if kind == "cache":
        write_cache(path, [{"image_a": 0, "image_b": 1}], [(16, 16)] * 2)
        path = next(path.glob("*.safetensors"))
    else:
        whole = stored / name.split("/")[0]
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / whole.name)
    load(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as error:
        load(path)
    named = (
        path.name
        if kind == "cache"
        else str(path.parent if kind in ("shard", "index", "values beside shards") else path)
    )
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    sharded: bool, stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"state_dict": {"w": torch.ones(999)}, "optimizer_states": [], "pytorch-lightning_version": "2.6.6"}
    torch.save(content, tmp_path / "epoch=1.ckpt")
    damaged = tmp_path / "last.ckpt"
    if sharded:
        shutil.copytree(stored / "shards", damaged)
        os.utime(damaged)
        damaged /= "__0_0.distcp"
    else:
        torch.save(content, damaged)
    damaged.write_bytes(flipped(damaged.read_bytes()))
    assert newest_intact([tmp_path / "last.ckpt"]) == tmp_path / "epoch=1.ckpt"
    assert "last.ckpt is damaged" in caplog.text


def test_shards_of_lightnings_own_strategies_load(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "shards", tmp_path / "shards")
    (tmp_path / "shards" / INDEX_HASH).unlink()
    read_checkpoint(tmp_path / "shards")
