"""No code runs from a checkpoint, wherever it lies and by whatever name Lightning finds it."""

import ast
import os
import pickle
import runpy
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint

from latentreward.apps.commands.fit import guard_loading
from latentreward.core.checkpoints.shards import INDEX, REST, read_checkpoint
from latentreward.core.errors import InputError
from tests.marks import slow_after
from tests.small_user import refusal, run
from tests.source_code import parsed

COMMANDS = ("fit", "validate", "test", "predict")


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def load_unsafely(path: str) -> Any:
    return torch.load(path, weights_only=False)


def dotted(canary: Path) -> bytes:
    """A pickle that finds a shell through what PyTorch's reader of shards imports, by names with dots."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    def name(value: str) -> bytes:
        return text("torch.distributed.checkpoint.filesystem") + text(value) + b"\x93"

    def call(function: bytes, argument: bytes) -> bytes:
        return function + argument + b"\x85R"

    module = call(call(name("operator.attrgetter"), text("__init__.__globals__")), name("FileSystemReader"))
    shell = call(
        call(name("operator.attrgetter"), text("system")), call(call(name("operator.itemgetter"), text("os")), module)
    )
    return b"\x80\x04" + call(shell, text(f"touch {canary}")) + b"."


PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "a shell": lambda canary: Call(os.system, f"touch {canary}"),
    "a process": lambda canary: Call(subprocess.call, ["touch", str(canary)]),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w')"),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Call(open, str(canary), "w"),
    "a method": lambda canary: Call(Path.touch, canary),
    "a script": lambda canary: Call(runpy.run_path, str(canary.with_name("script.py"))),
    "torch.load": lambda canary: Call(load_unsafely, str(canary.with_name("hidden.ckpt"))),
}
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "zip": torch.save,
    "legacy": partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """File that only a payload makes."""
    path = tmp_path / "canary"
    (tmp_path / "script.py").write_text(f"open({str(path)!r}, 'w')")
    torch.save(Call(Path.touch, path), tmp_path / "hidden.ckpt")
    return path


KINDS = [(payload, writer) for payload in PAYLOADS for writer in WRITERS]
CASES = [(*kind, COMMANDS[n % 4]) for n, kind in enumerate(KINDS)]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_do_run_where_nothing_holds_them(payload: str, canary: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": PAYLOADS[payload](canary)}, tmp_path / "evil.ckpt")
    load_unsafely(str(tmp_path / "evil.ckpt"))
    assert canary.exists()


@pytest.mark.parametrize(("payload", "writer", "command"), slow_after(8, CASES))
def test_no_payload_runs_from_a_file(
    payload: str, writer: str, command: str, canary: Path, tmp_path: Path, capsys: Any
) -> None:
    WRITERS[writer]({"state_dict": {}, "evil": PAYLOADS[payload](canary)}, tmp_path / "evil.ckpt")
    said = refusal(capsys, command, tmp_path, f"--ckpt_path={tmp_path}/evil.ckpt")
    assert said.startswith("ckpt_path: checkpoint ")
    assert "/evil.ckpt is damaged" in said
    assert "could run code" in said
    assert "weights_only" not in said
    assert not canary.exists()


@pytest.mark.parametrize("part", [INDEX, "names with dots", REST, "a value"])
def test_no_payload_runs_from_shards(
    part: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, evil = tmp_path / "shards.ckpt", Call(Path.touch, canary)
    values = {"evil": evil} if part == "a value" else {}
    distributed_checkpoint.save({"state_dict": {"net": torch.ones(2)}, **values}, checkpoint_id=folder, no_dist=True)
    torch.save({"evil": evil} if part == REST else {}, folder / REST)
    if part == INDEX:
        (folder / INDEX).write_bytes(pickle.dumps(evil))
    if part == "names with dots":
        (folder / INDEX).write_bytes(dotted(canary))
    assert "could run code" in refusal(capsys, "fit", tmp_path, f"--ckpt_path={folder}")
    assert not canary.exists()


def set_on(owner: bytes, **attributes: object) -> bytes:
    """A pickle that sets attributes of what has this name, by pickle's operation BUILD."""
    return b"\x80\x04c" + owner + b"\n" + pickle.dumps((None, attributes), 2)[2:-1] + b"b."


@pytest.mark.parametrize(
    "owner",
    [
        b"pathlib\nPosixPath",
        b"torch.serialization\n_get_layout",
        b"torch\nfloat32",
        b"torch.distributed.checkpoint.metadata\nMetadata",
    ],
)
def test_an_index_of_shards_sets_no_attribute_of_a_class_or_function(owner: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "shards.ckpt"
    distributed_checkpoint.save({"state_dict": {"net": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    torch.save({}, folder / REST)
    assert torch.equal(read_checkpoint(folder)["state_dict"]["net"], torch.ones(2))
    (folder / INDEX).write_bytes(set_on(owner, name="", evil=1))
    with pytest.raises(InputError, match=r"is damaged.*\(the index sets attributes of"):
        read_checkpoint(folder)
    assert not hasattr(Path, "evil")


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/x", "..", "", Path("__0_0.distcp"), 7])
def test_an_index_of_shards_names_files_beside_it(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "shards.ckpt"
    distributed_checkpoint.save({"state_dict": {"net": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    torch.save({}, folder / REST)
    index = pickle.loads((folder / INDEX).read_bytes())
    for info in index.storage_data.values():
        info.relative_path = name
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match="which lies elsewhere"):
        read_checkpoint(folder)


@pytest.mark.slow
def test_no_payload_runs_from_a_checkpoint_that_lightning_chooses(
    canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "run" / "hpc_ckpt_1.ckpt", tmp_path / "run" / "checkpoints" / "last.ckpt"):
        torch.save({"state_dict": Call(Path.touch, canary)}, path)
    for name in ("hpc", "last"):
        for command in COMMANDS:
            said = refusal(capsys, command, tmp_path, f"--ckpt_path={name}")
            assert "it names getattr" in said
            assert "weights_only" not in said
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    assert "hpc_ckpt_1.ckpt" in refusal(capsys, "fit", tmp_path)
    assert not canary.exists()


def test_a_setting_cannot_ask_for_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "good.ckpt")
    said = refusal(capsys, "fit", tmp_path, f"--ckpt_path={tmp_path}/good.ckpt", "--weights_only=false")
    assert said == "weights_only: false would let a checkpoint run code; leave it out"


def test_strategies_that_unpickle_by_themselves_never_see_an_unchecked_file(canary: Path, tmp_path: Path) -> None:
    module = run("fit", tmp_path, "--trainer.max_steps=1")
    loaded: list[Any] = []
    strategy = module.trainer.strategy
    del strategy.load_checkpoint
    strategy.load_checkpoint = lambda path, weights_only: loaded.append(weights_only) or torch.load(path)
    guard_loading(module.trainer, module)
    torch.save({"evil": Call(Path.touch, canary)}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        strategy.load_checkpoint(tmp_path / "evil.ckpt")
    strategy.load_checkpoint(tmp_path / "run" / "checkpoints" / "epoch=0-step=1.ckpt", weights_only=None)
    assert loaded == [True]
    assert not canary.exists()


@pytest.mark.slow
def test_every_torch_load_of_ours_takes_tensors_and_plain_values_alone() -> None:
    root = Path(__file__).resolve().parents[2]
    calls = [
        (path.name, node)
        for path in [*(root / "src").rglob("*.py"), *(root / "callbacks").glob("*.py")]
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) > 5
    for name, call in calls:
        values = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert values.get("weights_only") == "True", name


@pytest.mark.parametrize("content", [{"net.weight": torch.zeros(1)}, [1], {"state_dict": {}}])
def test_what_lightning_did_not_write_is_one_line(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "weights.ckpt")
    said = refusal(capsys, "fit", tmp_path, f"--ckpt_path={tmp_path}/weights.ckpt")
    assert said == f"ckpt_path: {tmp_path}/weights.ckpt is not a Lightning checkpoint; give one that `fit` wrote"


def test_a_checkpoint_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"checkpoint .*cut.ckpt is damaged"):
        read_checkpoint(path)
