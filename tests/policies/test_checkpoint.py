"""A policy comes back from the checkpoint of a run."""

from pathlib import Path

import pytest
import torch
from latentreward.callbacks import TrainableCheckpoint
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from latentreward.backbones.tuning import LoRA
from latentreward.errors import InputError
from latentreward.policies import POLICY, PolicySource, load_policy
from latentreward.policies.checkpoint import SOURCE, read_policy_adapter
from tests.marks import rotated_after
from tests.policies.alignment import Matching, prediction, tiny_source


def trained(folder: Path, name: str, trainable_only: bool = True) -> tuple[Matching, Path]:
    module = Matching(tiny_source(name))
    callbacks = [TrainableCheckpoint()] if trainable_only else []
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(["a cat", "two dogs"], batch_size=1))
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


@pytest.mark.parametrize("trainable_only", rotated_after(1, [True, False]))
def test_policy_of_a_checkpoint_predicts_as_the_trained_one(trainable_only: bool, tmp_path: Path) -> None:
    module, path = trained(tmp_path, "sd15", trainable_only)
    policy = load_policy(path)
    expected = prediction(module.policy.eval())
    torch.testing.assert_close(prediction(policy), expected, rtol=0, atol=0)
    with module.policy.reference():
        assert not torch.equal(prediction(module.policy), expected)
    assert not policy.training


@pytest.mark.slow
def test_another_adapter_or_another_file_is_refused(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "sd15")
    with pytest.raises(InputError, match=r"lora_A\.policy.*rank"):
        load_policy(path, tiny_source("sd15", lora=LoRA(3, 3.0)))
    with pytest.raises(InputError, match=r"belongs to the base .*sd15, whose network"):
        load_policy(path, tiny_source("sd21"))
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if POLICY not in name}
    torch.save(content, path)
    with pytest.raises(InputError, match="an alignment run"):
        load_policy(path)
    with pytest.raises(InputError, match="does not exist"):
        load_policy(tmp_path / "other.ckpt", PolicySource())


def test_how_a_run_executed_is_not_taken_over(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "sd15")
    content = torch.load(path, weights_only=True)
    content[SOURCE] |= {"attention_backend": "flash", "compile_blocks": True, "gradient_checkpointing": True}
    torch.save(content, path)
    source = read_policy_adapter(path).source
    assert (source.attention_backend, source.compile_blocks, source.gradient_checkpointing) == (None, False, False)
    content[SOURCE] |= {"unknown": 1}
    torch.save(content, path)
    with pytest.raises(InputError, match="policy_source is of another version"):
        read_policy_adapter(path)
