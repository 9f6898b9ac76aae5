"""Work of one process, and settings of processes that are refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.errors import InputError
from latentreward.core.shared_work import ShardFolder, SharedWork, TrainerSettings
from latentreward.core.storage.durable import locked, temporary_name


def test_one_process_does_shard_after_shard(tmp_path: Path) -> None:
    kept: list[Any] = []
    with SharedWork(None, "cpu", tmp_path / "shards") as work:
        work.join({"double": lambda shards: lambda shard: 2 * shard}, {})
        assert work.first
        work.run("double", [1, 2], kept.append, kept.append)
    assert kept == [[(1, 2)], 1, [(2, 4)], 2]
    assert not (tmp_path / "shards").exists()


def test_what_is_left_over_is_kept_until_the_work_is_done(tmp_path: Path) -> None:
    todo = tmp_path / "shards" / "killed" / "0"
    todo.mkdir(parents=True)
    (todo / "plan.json").write_text(json.dumps({"task": "double", "shards": [1, 2]}))
    (todo / "000001.json").write_text("4")
    with pytest.raises(RuntimeError), SharedWork(None, "cpu", tmp_path / "shards") as work:
        raise RuntimeError
    with SharedWork(None, "cpu", tmp_path / "shards") as work:
        assert work.left_over("double") == [(2, 4)]
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("held", [False, True])
def test_unfinished_files_are_removed_after_an_error(held: bool, tmp_path: Path) -> None:
    """But neither before the input has been checked, nor if another command writes to the folder by then."""
    own = temporary_name(tmp_path / "sub" / "shard.safetensors")
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    unfinished = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{killed.pid}-"))
    unfinished.parent.mkdir()
    unfinished.touch()

    def work_on(shards: Sequence[Any]) -> Callable[[Any], Any]:
        raise RuntimeError

    with pytest.raises(InputError), SharedWork(None, "cpu", tmp_path / "shards") as work:
        work.join({"work": work_on}, {}, tmp_path)
        raise InputError("wrong input")
    assert unfinished.exists()
    with (
        locked(tmp_path, "output") if held else nullcontext(),
        pytest.raises(RuntimeError),
        SharedWork(None, "cpu", tmp_path / "shards") as work,
    ):
        work.join({"work": work_on}, {}, tmp_path)
        work.run("work", [1], lambda results: None)
    assert unfinished.exists() == held


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ({"seed": 1, "sizes": (8, 8), "model": "a"}, ""),
        ({"seed": 2, "sizes": (8, 8), "base": None}, "seed, model: not as in the first process; give all processes"),
    ],
)
def test_other_settings_are_named(own: dict[str, Any], names: str, tmp_path: Path) -> None:
    with SharedWork(None, "cpu", tmp_path / "shards") as work:
        work._shared = ShardFolder(tmp_path / "shards", 0)
        work._settings = {"seed": 1, "sizes": [8, 8], "model": "a"}  # as the first process sent them
        with pytest.raises(InputError, match=names) if names else nullcontext():
            work.join({}, own)


@pytest.mark.parametrize(
    ("trainer", "device", "message"),
    [
        (TrainerSettings("cpu", 2), "cpu", "device is 'cpu'"),
        (TrainerSettings("cpu", 2, strategy="fsdp"), "auto", "trainer.strategy is 'fsdp'"),
        *((TrainerSettings("cpu", odd), "auto", "trainer.devices is ") for odd in ("1/2", "nan", "-3", "")),
        (TrainerSettings("cpu", 0), "auto", "trainer: "),
        (TrainerSettings("abacus"), "auto", "trainer: .*abacus"),
    ],
)
def test_settings_that_do_not_fit(trainer: TrainerSettings, device: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        SharedWork(trainer, device, tmp_path)
    assert "\n" not in str(error.value)


def test_processes_of_torchrun_need_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torchrun has started 2 processes; set trainer\.devices"):
        SharedWork(None, "auto", tmp_path)
