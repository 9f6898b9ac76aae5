"""What a run refuses to load, and to write: another model's weights, and weights that are not finite."""

import math
import re
from pathlib import Path

import pytest
import torch
from latentreward.callbacks import NaNGuard

from latentreward.apps.cli import main
from latentreward.core.checkpoints.shards import not_finite
from tests.marks import slow_after
from tests.small_user import RUNS, refusal, run

EACH_STEP = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
)


@pytest.mark.parametrize("command", slow_after(1, ["fit", "validate"]))
def test_another_models_checkpoint_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", tmp_path, "--trainer.max_steps=1", "--model.width=5")
    path = tmp_path / "run" / "checkpoints" / "epoch=0-step=1.ckpt"
    said = refusal(capsys, command, tmp_path, f"--ckpt_path={path}")
    shapes = "net.0.bias has shape (5,), not (3,) (3 in all)"
    same = "backbone, tuning and head must be those it was trained with"
    assert said == f"ckpt_path: {path}: the checkpoint does not fit: {shapes}; {same}"
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {"other.weight": torch.ones(2), "other.bias": torch.ones(1)}
    torch.save(content, path)
    said = refusal(capsys, command, tmp_path, f"--ckpt_path={path}")
    names = "it lacks net.0.bias (4 in all), it has the unknown weight other.bias (2 in all)"
    assert said == f"ckpt_path: {path}: the checkpoint does not fit: {names}; {same}"


def test_damaged_values_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", tmp_path, "--trainer.max_steps=1", *EACH_STEP)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    data = bytearray(path.read_bytes())
    place = data.index(torch.load(path, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes())
    data[place] ^= 0x55
    for file in path.parent.glob("*.ckpt"):
        file.write_bytes(data)
    said = refusal(capsys, "validate", tmp_path, *EACH_STEP, f"--ckpt_path={path}")
    assert re.search(r"ckpt_path: .*last.ckpt is damaged.* does not fit its checksum\)", said)


@pytest.mark.slow
def test_fit_refuses_weights_alone_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", tmp_path, "--trainer.max_steps=2", *EACH_STEP, "--trainer.callbacks.save_weights_only=true")
    path = tmp_path / "run" / "checkpoints" / "epoch=0-step=2.ckpt"
    without = "holds weights alone, without the state of the optimiser (save_weights_only); resume from"
    made = len(RUNS)
    assert refusal(capsys, "fit", tmp_path, f"--ckpt_path={path}").startswith(f"ckpt_path: {path} {without}")
    assert len(RUNS) == made
    said = refusal(capsys, "fit", tmp_path, *EACH_STEP, "--ckpt_path=last")  # whose folder the callbacks tell
    assert said.startswith(f"ckpt_path: {path.with_name('last.ckpt')} {without}")
    run("validate", tmp_path, f"--ckpt_path={path}")


@pytest.mark.parametrize("value", slow_after(1, ["nan", "inf", "-inf"]))
@pytest.mark.parametrize("weights_only", ["false", "true"])
def test_weights_that_the_last_step_spoilt_are_not_saved(
    value: str, weights_only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = (*EACH_STEP, f"--trainer.callbacks.save_weights_only={weights_only}")
    spoilt = ("--model.spoil_at=3", f"--model.value={value}")
    said = refusal(capsys, "fit", tmp_path, "--trainer.max_steps=3", *saving, *spoilt)
    assert said.startswith("net.2.weight is not finite at optimiser step 3; this checkpoint was not written")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    for path in folder.iterdir():
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == 2
        assert not_finite(content["state_dict"]) is None


def test_an_optimiser_state_that_is_not_finite_is_not_saved(tmp_path: Path, capsys) -> None:
    module = run("fit", tmp_path, "--trainer.max_steps=1")
    weight = module.net[0].weight
    module.trainer.optimizers[0].state[weight]["exp_avg_sq"][0] = float("inf")
    guard = next(callback for callback in module.trainer.callbacks if isinstance(callback, NaNGuard))
    guard.setup(module.trainer, module, "fit")
    with pytest.raises(ValueError, match=r"the optimiser's exp_avg_sq of net\.0\.weight is not finite"):
        module.trainer.save_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_all_and_only_finite_values_count_as_finite(dtype: torch.dtype) -> None:
    largest = torch.full((4096,), torch.finfo(dtype).max).to(dtype)  # their sum is infinite
    assert not_finite({"a": largest, "b": torch.zeros(0), "c": torch.arange(3)}) is None
    for value in (float("nan"), float("inf"), float("-inf")):
        if dtype != torch.float8_e4m3fn or math.isnan(value):  # that type has no infinities
            spoilt = largest.float().clone()
            spoilt[17] = value
            assert not_finite({"a": largest, "b": spoilt.to(dtype)}) == "b"


def test_consolidate_refuses_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"head": torch.tensor([1.0, float("nan")])}}, tmp_path / "bad.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["consolidate", str(tmp_path / "bad.ckpt"), str(tmp_path / "out.ckpt")])
    assert stop.value.code == 2
    assert "head is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()
