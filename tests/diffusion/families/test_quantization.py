"""Frozen layers in 8 bits: scores near those of bfloat16, gradients for adapters, runs that are saved and loaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import TrainableCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from latentreward.alignment import Policy
from latentreward.apps.cli import main
from latentreward.core.checkpoints.base_weights import BaseSample, is_quantized, keep_sample, quantized_names, sample
from latentreward.core.checkpoints.shards import frozen_names, read_checkpoint
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.reward import DiNaLRMModule, GatedQFormerHead, RewardModel
from latentreward.reward.modules.sharding import check_axes
from latentreward.reward.modules.training import frozen_values
from tests.alignment.modules.lpo_runs import make_trainer
from tests.diffusion.families.test_methods import pairs, sgd
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, noise_for

FAMILIES = [twin for twin in TWINS.values() if twin.name in ("z_image", "flux1_dev")]
some = pytest.mark.parametrize("twin", FAMILIES, ids=lambda twin: twin.name)
TOLERANCE = 0.05
"""Largest difference of the output from that of bfloat16 weights, relative to its norm."""


def policy_of(twin: Twin, quantization: Any = None) -> Policy:
    return twin.source(frozen_dtype="bfloat16", quantization=quantization, lora=LoRA(2, 5.0)).load(seed=1)


def output(policy: Policy, twin: Twin) -> torch.Tensor:
    latents = noise_for(policy.latent_shape(*twin.size))
    with torch.autocast("cpu", torch.bfloat16):
        return policy.predict(latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS)).float()


@some
def test_linear_layers_of_blocks_are_stored_in_eight_bits(twin: Twin) -> None:
    policy = policy_of(twin, "int8")
    stored = {name: is_quantized(weight) for name, weight in policy.network.named_parameters()}
    inside = {id(layer) for block in policy.blocks() for layer in block.modules()}
    for name, layer in policy.network.named_modules():
        if isinstance(layer, nn.Linear):
            assert stored[f"{name}.weight"] == (id(layer) in inside and "lora_" not in name), name


@some
def test_predictions_stay_near_those_of_bfloat16(twin: Twin) -> None:
    with torch.no_grad():
        want, found = (output(policy_of(twin, kind).eval(), twin) for kind in (None, "int8"))
    difference = (found - want).norm() / want.norm()
    assert 0 < difference < TOLERANCE


@some
def test_adapters_train_on_a_quantised_base(twin: Twin) -> None:
    policy = policy_of(twin, "int8")
    trained = [weight for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained and not any(map(is_quantized, trained))
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        loss = (output(policy, twin) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(weight.grad.isfinite().all() for weight in trained)


@pytest.mark.gpu
@some
def test_bitsandbytes_predicts_near_bfloat16_and_trains_adapters(twin: Twin) -> None:
    outputs = []
    for quantization in (None, "nf4"):
        policy = policy_of(twin, quantization).to("cuda")
        latents = noise_for(policy.latent_shape(*twin.size)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            encoded = policy.encode_prompts(PROMPTS)
            outputs.append(policy.predict(latents, torch.tensor([300.0, 800.0]).cuda(), encoded).float())
    want, found = outputs
    assert 0 < (found - want).norm() / want.norm() < 0.3
    found.square().mean().backward()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)
    assert any(weight.grad.any() for weight in trained)


def test_a_base_record_and_a_digest_leave_no_quantised_values_unseen() -> None:
    twin = FAMILIES[0]
    plain, quantised = policy_of(twin), policy_of(twin, "int8")
    names = {name for name, weight in quantised.named_parameters() if is_quantized(weight)}
    biases = {name.replace(".weight", ".bias") for name in names} & quantised.state_dict().keys()
    assert names | biases == quantized_names(quantised) != set()
    wanted, found = (BaseSample.of(policy, "").values for policy in (plain, quantised))
    assert wanted.keys() == found.keys() >= names
    assert all(torch.equal(found[name], wanted[name]) for name in found)  # of the files' weights
    first, second = (
        [bytes(part) for part in frozen_values(quantised, names) if not isinstance(part, str)] for _ in "12"
    )
    assert first == second and len(first) >= 2 * len(names)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = FAMILIES[0]
    with pytest.raises(InputError, match="quantised weights cannot train"):
        create_backbone(twin.backbone, source=twin.folder, tuning="full", quantization="int8")
    with pytest.raises(InputError, match="is quantised, which FSDP2 cannot shard"):
        check_axes(policy_of(twin, "int8"))
    monkeypatch.setattr("latentreward.diffusion.backbones.weights.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"quantization=int8 needs torchao; pip install latentreward\[quant\]"):
        policy_of(twin, "int8")


@pytest.mark.slow
def test_a_run_is_saved_and_its_policy_loaded_again(tmp_path: Path) -> None:
    from latentreward.alignment import LPOModule, load_policy
    from tests.alignment.modules.simple_reward import FirstChannelReward
    from tests.diffusion.families.test_methods import PAIRWISE, PromptLoaders, sampling

    twin = FAMILIES[0]
    source = twin.source(frozen_dtype="bfloat16", quantization="int8", lora=LoRA(2, 5.0))
    module = LPOModule(source, FirstChannelReward(), sampling=sampling(twin), optimizer=sgd, seed=0, **PAIRWISE)
    data = PromptLoaders(PROMPTS, batch_size=2, prompts_per_rollout=2, batches_per_epoch=2, seed=1)
    trainer = make_trainer(tmp_path, max_steps=2, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for options, message in (
        ({"quantization": None}, r"trained with policy\.quantization=int8, not None; give policy\.quantization as it"),
        (
            {"family": "latentreward.diffusion.families.flux1.Flux1"},
            r"trained with policy\.family=None, not latentreward\.",
        ),
    ):
        other = replace(source, **options)
        resumed = LPOModule(other, FirstChannelReward(), sampling=sampling(twin), optimizer=sgd, seed=0, **PAIRWISE)
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path, max_steps=3).fit(resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    again = load_policy(tmp_path / "last.ckpt")
    assert not any(map(is_quantized, again.parameters()))  # only training quantises
    for name, weight in module.policy.named_parameters():
        if weight.requires_grad:
            assert torch.equal(again.get_parameter(name), weight), name


def reward_module(twin: Twin, quantization: Any = "int8") -> DiNaLRMModule:
    torch.manual_seed(0)
    taps = {"visual_taps": [1, 2], "text_taps": [1, 2], "lora": LoRA(2, 4.0)}
    backbone = create_backbone(
        twin.backbone, source=twin.folder, frozen_dtype="bfloat16", quantization=quantization, **taps
    )
    return DiNaLRMModule(backbone, lambda spec: GatedQFormerHead(spec, num_queries=2, num_heads=2), optimizer=sgd)


class LibraryWeight(nn.Parameter):
    """Parameter whose ``detach`` gives a plain tensor, as that of bitsandbytes' parameters does."""


class LibraryLinear(nn.Linear):
    """Linear layer that writes scales and code books as bitsandbytes' layers do on a GPU, and cannot read them."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("SCB", "weight_format", "weight.absmax", "weight.quant_map"):
            destination[prefix + name] = torch.ones(3)


def test_a_bias_that_trains_is_saved_and_a_base_record_is_of_the_files_weights() -> None:
    layer = LibraryLinear(4, 4)
    kept = sample(layer.weight.detach())
    keep_sample(layer, kept)
    layer.weight = LibraryWeight(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
    network = nn.Sequential(layer, nn.Linear(4, 4))
    assert network.state_dict().keys() - quantized_names(network) == {"0.bias", "1.weight", "1.bias"}
    assert quantized_names(network) == frozen_names(network)
    assert torch.equal(BaseSample.of(network, "").values["0.weight"], kept)


def scores(model: RewardModel, twin: Twin) -> torch.Tensor:
    latents = noise_for(model.backbone.family.latent_shape(*twin.size), count=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model.score_latents([*PROMPTS, *PROMPTS], latents)


@pytest.mark.slow
def test_a_trained_reward_is_saved_published_and_resumed(tmp_path: Path) -> None:
    twin = FAMILIES[0]
    module = reward_module(twin)
    data = DataLoader([pairs(module.model.backbone.family, twin)] * 3, batch_size=None)
    for name in ("trained.ckpt", "all.ckpt"):
        trainer = make_trainer(tmp_path, max_steps=2, precision="bf16-mixed")
        if name == "all.ckpt":
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, TrainableCheckpoint)]
        last = tmp_path / "trained.ckpt" if name == "all.ckpt" else None
        trainer.fit(module, data, ckpt_path=last)
        trainer.save_checkpoint(tmp_path / name)
        assert not quantized_names(module) & read_checkpoint(tmp_path / name)["state_dict"].keys()
    trainer = make_trainer(tmp_path, max_steps=3, precision="bf16-mixed")
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, TrainableCheckpoint)]
    trainer.fit(reward_module(twin), data, ckpt_path=tmp_path / "all.ckpt")
    with pytest.raises(InputError, match=r"trained with backbone\.quantization=int8, not None"):
        make_trainer(tmp_path, max_steps=3).fit(reward_module(twin, None), data, ckpt_path=tmp_path / "trained.ckpt")
    trainer.validate(reward_module(twin, None), data, ckpt_path=tmp_path / "all.ckpt", verbose=False)

    trained = module.model.eval()
    trained.save_pretrained(tmp_path / "saved")
    main(["publish", str(tmp_path / "trained.ckpt"), str(tmp_path / "published"), "--device=cpu"])
    record = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization" not in record["backbone"]["init_args"]
    for name in ("base.safetensors", "head.safetensors"):
        saved, published = (load_file(tmp_path / folder / name) for folder in ("saved", "published"))
        assert saved.keys() == published.keys()
        assert all(torch.equal(saved[key], published[key]) for key in saved)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = RewardModel.from_pretrained(tmp_path / "saved", base=twin.folder, dtype=dtype)
        assert not any(map(is_quantized, loaded.parameters()))
        want, found = scores(trained, twin), scores(loaded, twin)
        assert 0 < (found - want).norm() / want.norm() < TOLERANCE
