"""The LoRA that a run leaves for diffusers."""

from pathlib import Path

import pytest
import torch
from latentreward.callbacks import PolicyLoRA
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from latentreward.errors import InputError
from tests.policies.alignment import Matching, tiny_source

SCALE = 2.0
"""alpha / rank of the runs here, by which B is multiplied in the LoRA file."""


class StopAfter(Callback):
    """Ends training after some steps, by an exception if asked to."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step == 3:
            raise KeyError("a fault")


def fit(folder: Path, *callbacks: Callback) -> Matching:
    module = Matching(tiny_source("sd35_no_t5"))
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver, *callbacks],
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(["a cat", "two dogs", "a tree"], batch_size=1))
    return module


def lora_b(weights: dict[str, torch.Tensor], start: str) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in sorted(weights.items()) if "lora_B" in name and start in name])


def test_lora_is_the_one_of_the_end_of_training(tmp_path: Path) -> None:
    module = fit(tmp_path, PolicyLoRA())
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    written = lora_b(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"), "transformer.")
    own = {name: value.detach() for name, value in module.policy.named_parameters()}
    torch.testing.assert_close(written, SCALE * lora_b(own, "network."), rtol=0, atol=0)
    assert written.any()


def test_lora_of_the_last_checkpoint_outlives_a_fault(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, PolicyLoRA(tmp_path / "mine"), StopAfter())
    (checkpoint,) = tmp_path.glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    written = lora_b(load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors"), "transformer.")
    # The checkpoint, from which a run resumes, holds B as it is trained.
    torch.testing.assert_close(written, SCALE * lora_b(saved, "policy.network."), rtol=0, atol=0)


def test_module_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BoringModel has no policy"):
        Trainer(fast_dev_run=1, logger=False, callbacks=[PolicyLoRA()], default_root_dir=tmp_path).fit(BoringModel())
