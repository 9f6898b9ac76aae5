"""Policies on two processes: predictions and steps equal those of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import PolicyLoRA, TrainableCheckpoint
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from latentreward.alignment import AlignmentModule, Policy, RewardSource, load_policy, surrogate
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.checkpoints.shards import whole_tensor
from latentreward.core.contracts import NoisyStates
from tests.alignment.modules.batches import lrm
from tests.alignment.policies.alignment import Matching, perturbed, prediction, states, tiny_source
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import EveryNth, make_trainer, sgd
from tests.marks import WITH_ITS_FILE
from tests.tiny_pipelines import pipeline_folder

PROMPTS = ["a cat", "two dogs", "a red tree", "an old boat", "rain", "sun on snow", "a cup", "nothing"]


class Steered(Matching):
    """A gradient through a reward that is another adapter of the same network."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        network = self.policy.network
        trains = {parameter for parameter in network.parameters() if parameter.requires_grad}
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            inject_adapter_in_model(config, network, adapter_name="reward")
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in trains)
        self.policy.adapters.refresh()

    def training_step(self, batch: Sequence[str], batch_idx: int) -> Tensor:
        latents, timesteps = states(self.policy, batch)
        conditioning = self.policy.encode_prompts(batch)
        made = latents - self.policy.predict(latents, timesteps, conditioning)
        with self.policy.adapters.use("reward"):
            return surrogate(
                made, lambda z: self.policy.predict(z, timesteps, conditioning).square().flatten(1).mean(1)
            )


class OwnReward(RewardSource):
    """An LRM with a network of its own."""

    def latent_space(self) -> None:
        return None

    def load(self, policy: Policy) -> LatentScorer:
        model = lrm("sd15").model.requires_grad_(False)
        model.backbone.vae = None
        return LatentScorer(model, policy.noise_process, batch_size=1)


class SharedReward(OwnReward):
    """The same on the bare network of the policy, whose blocks it calls one by one."""

    def load(self, policy: Policy) -> LatentScorer:
        model = super().load(policy).model
        model.backbone = model.backbone.with_network(policy.network, policy.text_encoder)
        return LatentScorer(model, policy.noise_process, batch_size=1, policy=policy, switch=policy.reference)


class Rewarded(AlignmentModule):
    """A gradient through a reward."""

    def training_step(self, batch: Sequence[str], batch_idx: int) -> Tensor:
        latents, timesteps = states(self.policy, batch)
        made = latents - self.policy.predict(latents, timesteps, self.policy.encode_prompts(batch))
        rows = torch.arange(len(batch))
        return -self.reward(NoisyStates(made, timesteps, rows), self.reward.encode_prompts(batch)).mean()


class Outside(Callback):
    """What the policy predicts, with and without its adapter, outside any step, before and after training."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(prediction(pl_module.policy))
        with pl_module.policy.reference():
            self.seen.append(prediction(pl_module.policy))
        with torch.no_grad():
            self.seen.append(pl_module.policy.vae.decode(states(pl_module.policy, PROMPTS[:1])[0]))

    on_train_start = on_train_end = look


CASES = {
    "unet": lambda: Matching(tiny_source("sd15", gradient_checkpointing=True)),
    "sdxl": lambda: Matching(tiny_source("sdxl")),
    "dit": lambda: Matching(tiny_source("sd35", frozen_dtype="float32")),
    "reward": lambda: Rewarded(tiny_source("sd15"), OwnReward(), optimizer=sgd, guidance_scale=1.0),
    "shared reward": lambda: Rewarded(
        tiny_source("sd15", gradient_checkpointing=True), SharedReward(), optimizer=sgd, guidance_scale=1.0
    ),
    "two stages": lambda: Steered(tiny_source("sd35_no_t5", gradient_checkpointing=True)),
}


def trained(name: str, folder: Path, strategy: Any = "auto") -> dict[str, Any]:
    module, outside = CASES[name](), Outside()
    perturbed(module.policy)
    callbacks = [outside, TrainableCheckpoint(), PolicyLoRA(folder / name)]
    trainer = make_trainer(folder, strategy, callbacks=callbacks)
    batch = 4 // trainer.world_size
    trainer.fit(module, DataLoader(PROMPTS, batch, sampler=EveryNth(len(PROMPTS))))
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return {
        "weights": {key: whole_tensor(value) for key, value in module.named_parameters() if value.requires_grad},
        "outside": outside.seen,
        "sharded": all(isinstance(value, DTensor) for value in module.policy.parameters()),
    }


def all_cases(folder: Path) -> dict[str, Any]:
    """On ranks: every case, with DDP and with FSDP2."""
    for name in ("sd15", "sdxl", "sd35", "sd35_no_t5"):
        pipeline_folder(name)
    results = {}
    for kind in ("ddp", "fsdp2"):
        (folder / kind).mkdir(exist_ok=True)
        for name in CASES:
            strategy = "ddp" if kind == "ddp" else FSDP2Strategy()
            results[f"{kind} {name}"] = trained(name, folder / kind, strategy)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return on_ranks("tests.distributed.test_alignment:all_cases", folder)


@pytest.mark.parametrize("name", [pytest.param(name, marks=WITH_ITS_FILE) for name in CASES])
def test_predictions_and_steps_equal_one_process(
    name: str, folder: Path, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    one = trained(name, tmp_path)
    for kind in ("ddp", "fsdp2"):
        for rank in ranks:
            two = rank[f"{kind} {name}"]
            assert two["sharded"] == (kind == "fsdp2")
            torch.testing.assert_close(two["outside"], one["outside"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-6)
        written = load_file(folder / kind / name / "pytorch_lora_weights.safetensors")
        expected = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-6)
    before, after = one["outside"][0], one["outside"][3]
    assert (after - before).abs().max() > 1e-3
    if name != "two stages":  # whose second adapter no reward brought along
        loaded = load_policy(folder / "fsdp2" / f"{name}.ckpt", CASES[name]().policy_source)
        torch.testing.assert_close(prediction(loaded), after, rtol=1e-4, atol=1e-5)
