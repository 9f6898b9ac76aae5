"""Sharded checkpoints are read whole without running code; optimiser states pass between names and numbers."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

from latentreward.apps.cli import main
from latentreward.core.checkpoints.shards import (
    INDEX,
    REST,
    check_weights,
    frozen_names,
    is_sharded,
    named,
    numbered,
    read_checkpoint,
    read_sharded,
    shard_index,
)
from latentreward.core.errors import InputError
from latentreward.reward import BradleyTerryLoss, RewardHead


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/latentreward_was_here", "w"))


def written(folder: Path, **values: Any) -> Path:
    """A sharded checkpoint of one process, laid out as Lightning's."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.5)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = [name for name, _ in network.named_parameters()]
    state = optimizer.state_dict()
    by_name = {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    content = {"state_dict": network.state_dict(), "optimizer_0": {**by_name, **values}}
    distributed_checkpoint.save(content, checkpoint_id=folder, no_dist=True)
    average = {name: value + 1 for name, value in network.state_dict().items()}
    callbacks = {"TrainableEMA": {"average": average, "updates": 3}}
    torch.save({"epoch": 1, "callbacks": callbacks, "lr_schedulers": []}, folder / REST)
    return folder


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    content = read_sharded(written(tmp_path / "shards"))
    assert is_sharded(tmp_path / "shards")
    assert content["epoch"] == 1
    assert list(content["state_dict"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    (state,) = content["optimizer_states"]
    assert state["param_groups"][0]["lr"] == 0.5
    assert state["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert state["state"][2]["exp_avg"].shape == (1, 3)


def test_names_and_numbers_of_an_optimiser_state_are_told_apart_by_its_groups() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    vectors = [p for p in network.parameters() if p.ndim == 1]
    matrices = [p for p in network.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    by_name = named(state, optimizer, network)
    assert by_name["param_groups"][0]["params"] == ["0.weight", "1.weight"]
    assert by_name["state"]["0.bias"] is state["state"][2]
    assert numbered(by_name) == state
    with pytest.raises(InputError, match="other parameters"):
        named(state, torch.optim.AdamW(network.parameters()), network)


@pytest.mark.parametrize("fault", ["index", "value", "rest"])
def test_shards_that_could_run_code_are_refused(fault: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "shards", **({"evil": Evil()} if fault == "value" else {}))
    if fault == "index":
        (folder / INDEX).write_bytes(pickle.dumps(Evil()))
    if fault == "rest":
        torch.save({"evil": Evil()}, folder / REST)
    Path("/tmp/latentreward_was_here").unlink(missing_ok=True)
    with pytest.raises(InputError, match="could run code"):
        read_sharded(folder, with_tensors=False)
    assert not Path("/tmp/latentreward_was_here").exists()


def test_incomplete_and_damaged_shards_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without"):
        read_sharded(tmp_path / "empty")
    with pytest.raises(InputError, match=r"^checkpoint: \S+ is a folder without .*; give a file, or all files"):
        read_checkpoint(tmp_path / "empty")
    folder = written(tmp_path / "shards")
    (shard,) = folder.glob("*.distcp")
    shard.unlink()
    with pytest.raises(InputError, match="damaged"):
        read_sharded(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["checkpoints/last.ckpt", "lora/pytorch_lora_weights.safetensors"], ".*/run/checkpoints/last.ckpt$"),
    ],
)
def test_a_folder_in_place_of_its_checkpoint_is_refused_by_what_it_holds(
    tmp_path: Path, files: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / "moved.ckpt").symlink_to(tmp_path / "gone.ckpt")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert re.search(f"checkpoint: {tmp_path}/run .*{reason}", capsys.readouterr().err.strip())


def test_weights_are_compared_by_name() -> None:
    network = nn.Linear(2, 2)
    shapes = {"weight": (2, 2), "bias": (2,)}
    check_weights(network, shapes)
    with pytest.raises(InputError, match="lacks bias"):
        check_weights(network, {"weight": (2, 2)})
    with pytest.raises(InputError, match="unknown weight extra"):
        check_weights(network, {**shapes, "extra": (1,)})
    with pytest.raises(InputError, match=r"weight has shape \(3, 2\), not \(2, 2\) \(1 in all\)"):
        check_weights(network, {**shapes, "weight": (3, 2)})
    network.bias.requires_grad_(False)
    check_weights(network, {"weight": (2, 2)})
    with pytest.raises(InputError, match=r"it lacks bias .* add TrainableCheckpoint"):
        check_weights(network, {"weight": (2, 2)}, strict=True)


def test_consolidate_writes_one_file_or_the_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(written(tmp_path / "shards"))
    main(["consolidate", folder, str(tmp_path / "one.ckpt")])
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert "4 tensors" in capsys.readouterr().out
    assert len(one["optimizer_states"]) == 1
    main(["consolidate", str(tmp_path / "one.ckpt"), str(tmp_path / "average.ckpt"), "--average=true"])
    average = torch.load(tmp_path / "average.ckpt", weights_only=True)
    for name, value in average["state_dict"].items():
        assert torch.equal(value, one["state_dict"][name] + 1)
    assert "callbacks" not in average


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out.ckpt"], "nowhere does not exist"),
        (["shards", "taken.ckpt"], "overwrite"),
        (["taken.ckpt", "out.ckpt"], "damaged"),
        (["average.ckpt", "out.ckpt", "--average=true"], "holds none"),
    ],
)
def test_consolidate_says_what_is_wrong(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("shards"))
    Path("taken.ckpt").write_bytes(b"something else")
    torch.save({"state_dict": {}, "callbacks": {}}, "average.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["consolidate", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path("out.ckpt").exists()


@pytest.mark.parametrize("change", ["no places of values", "a file elsewhere", "a list beside the shards"])
def test_an_index_that_no_checkpoint_has_is_one_line(change: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "shards")
    index = shard_index(folder)
    if change == "no places of values":
        index.planner_data = None
    elif change == "a file elsewhere":
        next(iter(index.storage_data.values())).relative_path = "../shards/__0_0.distcp"
    else:
        torch.save([1], folder / REST)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match="is damaged, or holds more than tensors"):
        read_sharded(folder)


class Centred(RewardHead):
    """A head that subtracts a running mean, which a module without parameters keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(2, 1), nn.Sequential(nn.Identity())
        self.register_buffer("mean", torch.zeros(()))
        self.inner[0].register_buffer("spread", torch.ones(()))

    def forward(self, features: Any) -> torch.Tensor:
        return self.linear(features).flatten() - self.mean


@pytest.mark.parametrize("trains", [True, False])
def test_buffers_of_a_head_that_trains_and_of_a_loss_are_no_frozen_weights(trains: bool) -> None:
    module = nn.Module()
    module.head, module.loss, module.base = Centred().requires_grad_(trains), BradleyTerryLoss(), nn.BatchNorm1d(2)
    module.base.requires_grad_(False)
    module.loss.register_buffer("scale", torch.ones(()))
    frozen = {"base.weight", "base.bias", "base.running_mean", "base.running_var", "base.num_batches_tracked"}
    of_head = set() if trains else {f"head.{name}" for name in module.head.state_dict()}
    assert frozen_names(module) == frozen | of_head
