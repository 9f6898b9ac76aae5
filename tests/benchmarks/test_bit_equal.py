"""The comparison of two versions sees what differs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bit_equal.py"


@pytest.fixture(scope="module")
def bit_equal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bit_equal", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path) -> Path:
    """What one version made."""
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"state_dict": {"weight": torch.ones(2)}, "callbacks": {}, "global_step": 3}, folder / "last.ckpt")
    (folder / "scores.json").write_text("[0.5]")
    return folder


def another_weight(folder: Path) -> None:
    save_file({"weight": torch.tensor([1.0, 1 + 1e-7])}, folder / "model.safetensors")


def another_name(folder: Path) -> None:
    state = {"weights": torch.ones(2)}
    torch.save({"state_dict": state, "callbacks": {}, "global_step": 3}, folder / "last.ckpt")


@pytest.mark.parametrize(
    ("change", "equal", "line"),
    [
        (lambda folder: None, True, "| model.safetensors | 1 | 1 | 0 |"),
        (another_weight, False, "| model.safetensors | 1 | 0 | 1.2e-07 |"),
        (another_name, False, "| last.ckpt | 2 | 0 | 0 |"),
        (lambda folder: (folder / "last.ckpt").unlink(), False, "| last.ckpt | | only in old | |"),
        (lambda folder: (folder / "scores.json").write_text("[0.25]"), False, "| scores.json | | different | |"),
    ],
)
def test_every_difference_counts(
    bit_equal: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, equal: bool, line: str
) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new")
    change(new)
    assert bit_equal.compare(old, new) is equal
    assert line in capsys.readouterr().out
