"""The LoRA that a run leaves for diffusers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import NaNGuard, PolicyLoRA, ResumedSettings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from latentreward.alignment import PolicySource, TrainedLoRA, write_kohya
from latentreward.alignment.export.lora import FILE
from tests.alignment.policies.alignment import Matching, tiny_source

SCALE = 2.0
"""alpha / rank of the runs here, by which B is multiplied in the LoRA file."""


class Fault(Callback):
    """Ends a resumed run in its first step."""

    def on_train_batch_start(self, *args: object) -> None:
        raise KeyError("a fault")


class StopAfter(Callback):
    """Ends training after some steps, by an exception if asked to."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == 3:
            raise KeyError("a fault")


class Watched(TorchCheckpointIO):
    """Notes at each checkpoint whether a LoRA is there, which belongs to the checkpoint before."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.lora, self.before = folder / "lora" / FILE, []

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        self.before.append(self.lora.exists())
        super().save_checkpoint(*args, **options)


def fit(
    folder: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    io: Watched | None = None,
    source: PolicySource | None = None,
) -> Matching:
    module = Matching(source or tiny_source("sd35_no_t5"))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver, *callbacks],
        default_root_dir=folder,
        plugins=[io] if io else None,
    )
    trainer.fit(module, DataLoader(["a cat", "two dogs", "a tree"], batch_size=1), ckpt_path=ckpt_path)
    return module


def lora_b(weights: dict[str, torch.Tensor], start: str) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in sorted(weights.items()) if "lora_B" in name and start in name])


def test_lora_of_the_last_checkpoint_outlives_a_fault(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, PolicyLoRA(tmp_path / "mine"), NaNGuard(), StopAfter())  # in the order of the command line
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    written = lora_b(load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors"), "transformer.")
    # The checkpoint, from which a run resumes, holds B as it is trained.
    torch.testing.assert_close(written, SCALE * lora_b(saved, "policy.network."), rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_saving_is_wrapped_once_however_often_an_error_ended_a_fit(tmp_path: Path, order: int) -> None:
    """Lightning calls no teardown after an error."""
    trainer = Trainer(logger=False, default_root_dir=tmp_path)
    module, callbacks = fit(tmp_path), [PolicyLoRA(tmp_path / "mine"), NaNGuard(), PolicyLoRA(tmp_path / "too")]
    for _ in range(3):
        for callback in callbacks[::order]:
            callback.setup(trainer, module, "fit")
    depth, save = 0, trainer.strategy.save_checkpoint
    while isinstance(save, partial):
        depth, save = depth + 1, save.args[-1]
    assert depth == len(callbacks)
    for callback in callbacks:
        callback.teardown(trainer, module, "fit")
    assert not isinstance(trainer.strategy.save_checkpoint, partial)


@pytest.mark.slow
def test_a_lora_is_never_ahead_of_its_checkpoint_and_is_written_again_on_resuming(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    fit(tmp_path, PolicyLoRA(), io=watched)
    assert watched.before == [False, True, True]
    whole = watched.lora.read_bytes()
    watched.lora.unlink()
    fit(tmp_path, PolicyLoRA(), ckpt_path=tmp_path / "step=3.ckpt")  # nothing to train
    assert watched.lora.read_bytes() == whole
    with pytest.raises(KeyError):
        fit(tmp_path, Fault(), PolicyLoRA(tmp_path / "second"), ckpt_path=tmp_path / "step=2.ckpt")
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    written = lora_b(load_file(tmp_path / "second" / FILE), "transformer.")
    torch.testing.assert_close(written, SCALE * lora_b(saved, "policy.network."), rtol=0, atol=0)


@pytest.mark.parametrize("write", [TrainedLoRA.write_diffusers, write_kohya])
def test_equal_weights_give_equal_bytes(write: Callable[[TrainedLoRA, Path], Path], tmp_path: Path) -> None:
    lora = TrainedLoRA.of_policy(tiny_source("sd15").load())
    assert len({write(lora, tmp_path).read_bytes() for _ in range(8)}) == 1
    assert load_file(next(tmp_path.iterdir())).keys()


@pytest.mark.parametrize("folder", [None, "mine"])
def test_each_run_in_a_folder_has_its_own_lora(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def write(path: Path | None = None) -> set[str]:
        before = {file: file.read_bytes() for file in tmp_path.glob(f"*/{FILE}")}
        lora = PolicyLoRA(folder and Path(folder))
        module = fit(tmp_path, lora, ResumedSettings(), ckpt_path=path)
        assert module.trainer.global_step == 3
        return {file.parent.name for file in tmp_path.glob(f"*/{FILE}") if before.get(file) is None}

    name = folder or "lora"
    assert [write(), write(), write(tmp_path / "step=2-v1.ckpt")] == [{name}, {f"{name}-v1"}, set()]
