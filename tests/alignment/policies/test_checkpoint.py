"""A policy comes back from the checkpoint of a run."""

from pathlib import Path

import pytest
import torch
from latentreward.callbacks import TrainableCheckpoint
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from latentreward.alignment import POLICY, PolicySource, load_policy
from latentreward.alignment.policies.checkpoint import SOURCE, read_policy_adapter
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.tuning import stored_ranks
from tests.alignment.policies.alignment import Matching, prediction, tiny_source
from tests.marks import rotated_after


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


@pytest.mark.slow
@pytest.mark.parametrize("trainable_only", rotated_after(1, [True, False]))
def test_policy_of_a_checkpoint_predicts_as_the_trained_one(trainable_only: bool, tmp_path: Path) -> None:
    module, path = trained(tmp_path, "sd15", trainable_only)
    policy = load_policy(path)
    expected = prediction(module.policy.eval())
    torch.testing.assert_close(prediction(policy), expected, rtol=0, atol=0)
    with module.policy.reference():
        assert not torch.equal(prediction(module.policy), expected)
    assert not policy.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 100_000}, "policy_source.lora: rank 100000 does not fit the stored weights"),
        ({"rank": "2"}, "policy_source.lora: rank '2' does not fit the stored weights"),
        ({"target_modules": ["to_q"] * 10_000}, "policy_source.lora: target_modules has 10000 entries for"),
        ({"alpha": "4"}, "lora: alpha: it must be a valid number, not '4'"),
        ({"alpha": float("nan")}, "lora: alpha: it must be a finite number, not nan"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused_before_any_layer_is_made(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    record = {"source": "sd_tiny", "lora": {"rank": 2, "alpha": 4.0} | change}
    state = {f"policy.network.layer.lora_A.{POLICY}.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": state, SOURCE: record}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=message):
        read_policy_adapter(tmp_path / "last.ckpt")


def test_narrow_tensors_of_a_large_rank_make_no_layer(tmp_path: Path) -> None:
    rank = 10**8  # a layer of this rank would take gigabytes, the tensors here take none
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.policy.weight"
    state = {
        f"policy.network.{name.format('A')}": torch.zeros(rank, 0),
        f"policy.network.{name.format('B')}": torch.zeros(0, rank),
    }
    torch.save({"state_dict": state, SOURCE: {"source": "sd_tiny", "lora": {"rank": rank}}}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="trained on sd_tiny, has 2 of 2 tensors without a place in the network"):
        load_policy(tmp_path / "last.ckpt")


def test_numbers_in_place_of_matrices_are_refused(tmp_path: Path) -> None:
    state = {f"policy.network.layer.lora_A.{POLICY}.weight": torch.zeros(())}
    torch.save({"state_dict": state, SOURCE: {"source": "sd_tiny", "lora": {"rank": 2}}}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"policy_source.lora: rank 2 does not fit the stored weights"):
        read_policy_adapter(tmp_path / "last.ckpt")
    shapes = {"0.lora_A.weight": (), "0.lora_B.weight": (4, 1)}
    with pytest.raises(InputError, match="has 2 of 2 tensors without a place in the network"):
        stored_ranks(nn.Sequential(nn.Linear(4, 4)), shapes, "the adapter")


@pytest.mark.slow
def test_another_adapter_or_another_file_is_refused(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "sd15")
    with pytest.raises(InputError, match=r"lora_A\.policy.*rank"):
        load_policy(path, tiny_source("sd15", lora=LoRA(3, 3.0)))
    with pytest.raises(InputError, match=r"trained on .*sd15, has 16 of 64 tensors without a place"):
        load_policy(path, tiny_source("sd21"))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "base": {**content["base"], "values": content["base"]["values"] + 1.0}}, path)
    with pytest.raises(InputError, match="the checkpoint belongs to the base"):
        load_policy(path)
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if POLICY not in name}
    torch.save(content, path)
    with pytest.raises(InputError, match="an alignment run"):
        load_policy(path)
    with pytest.raises(InputError, match="does not exist"):
        load_policy(tmp_path / "other.ckpt", PolicySource())


def test_how_a_run_executed_is_not_taken_over(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "sd15")
    content = torch.load(path, weights_only=True)
    content[SOURCE] |= {"attention_backend": "flash", "gradient_checkpointing": True}
    torch.save(content, path)
    source = read_policy_adapter(path).source
    assert (source.attention_backend, source.gradient_checkpointing) == (None, False)
    content[SOURCE] |= {"unknown": 1}
    torch.save(content, path)
    with pytest.raises(InputError, match="policy_source is of another version"):
        read_policy_adapter(path)
