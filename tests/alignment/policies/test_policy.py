"""Policies against diffusers' own pipelines, and what their settings promise."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from latentreward.alignment import POLICY, Policy, PolicySource
from latentreward.core.contracts import Conditioning
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.testing import check_family
from tests.alignment.policies.alignment import perturbed, prediction, tiny_source
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder

FAMILIES = ["sd15", "sd21", "sdxl", "sd3", "sd35", "sd35_no_t5"]


class Recorder(nn.Module):
    """Stands in for a pipeline's network and keeps what it is called with and what it answers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.network(*args, **kwargs)
        inputs = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.calls.append((inputs, timestep, answer[0]))
        return answer


def recorded(name: str, **options: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Calls of the network while diffusers draws one picture with guidance."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd35_no_t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(name), **absent)
    part = "transformer" if name.startswith("sd3") else "unet"
    recorder = Recorder(getattr(pipeline, part))
    setattr(pipeline, part, recorder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": generator}
    pipeline("a cat", **settings, **options)
    return recorder.calls


@pytest.mark.parametrize("name", rotated_after(2, FAMILIES))
def test_guided_prediction_is_that_of_the_diffusers_pipeline(name: str) -> None:
    """Text encoders, empty prompts, SDXL's sizes and zeros, SD3's towers with and without T5: all at once."""
    policy = tiny_source(name, t5_length=6).load()
    t5 = {"max_sequence_length": 6} if name.startswith("sd3") else {}
    conditioning, uncond = policy.encode_prompts(["a cat"]), policy.encode_uncond()
    for inputs, timestep, answer in recorded(name, height=16, width=16, **t5):
        without, with_prompt = answer.chunk(2)
        guided = policy.predict_guided(inputs[:1], timestep.reshape(-1)[:1].float(), conditioning, uncond, 3.0)
        torch.testing.assert_close(guided, without + 3.0 * (with_prompt - without), rtol=1e-4, atol=1e-5)
        plain = policy.predict_guided(inputs[:1], timestep.reshape(-1)[:1].float(), conditioning, None, 1.0)
        torch.testing.assert_close(plain, with_prompt, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["sd15", "sd35_no_t5"]))
def test_adapter_starts_as_no_change_and_depends_on_the_seed_alone(name: str) -> None:
    first = tiny_source(name).load(seed=1)
    torch.manual_seed(77)
    again, other = tiny_source(name).load(seed=1), tiny_source(name).load(seed=2)
    with first.reference():
        expected = prediction(first)
    torch.testing.assert_close(prediction(first), expected, rtol=0, atol=0)
    values = [{key: p for key, p in policy.named_parameters() if p.requires_grad} for policy in (first, again, other)]
    for key, value in values[0].items():
        assert torch.equal(value, values[1][key])
        assert torch.equal(value, values[2][key]) == key.endswith("lora_B.policy.weight")
    drawn = torch.cat([value.flatten() for key, value in values[0].items() if "lora_A" in key])
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05)  # 1 / rank


def test_only_the_adapter_trains_whatever_the_layers() -> None:
    layers = ("to_q", "conv1", "net.2", "conv_in", "time_emb_proj")
    policy = tiny_source("sd15", lora=LoRA(2, 2.0, target_modules=layers)).load()
    trained = {key for key, p in policy.named_parameters() if p.requires_grad}
    assert all(f".{POLICY}." in key for key in trained)
    for layer in layers:
        assert any(f".{layer}.lora_A" in f".{key}" for key in trained)
    perturbed(policy)
    with policy.reference():
        before = prediction(policy)
    assert not torch.equal(prediction(policy), before)


def test_dropout_is_the_adapters_and_of_training_alone() -> None:
    policy = perturbed(tiny_source("sd3", lora=LoRA(2, 2.0, dropout=0.5)).load())
    assert policy.training
    assert not torch.equal(prediction(policy), prediction(policy))
    with policy.reference():
        assert torch.equal(prediction(policy), prediction(policy))  # T5 has dropout of its own
    policy.eval()
    assert torch.equal(prediction(policy), prediction(policy))
    policy.train()
    assert not torch.equal(prediction(policy), prediction(policy))


def test_an_own_family_whose_evaluation_mode_has_no_gradient_is_named_and_may_train_in_training_mode() -> None:
    """Like diffusers' mixture of experts of HiDream: right outputs in both modes, a gradient in one."""
    policy = perturbed(tiny_source("sd15").load())
    layer = policy.network.mid_block.attentions[0].transformer_blocks[0].ff
    run = layer.forward
    layer.forward = lambda given: run(given) if policy.network.training else torch.no_grad()(run)(given)
    prompts = policy.encode_prompts(["a cat"])

    def gradient(family: type) -> Tensor:
        policy.family.__class__ = family
        policy.train()
        latents = torch.ones(1, 4, 8, 8, requires_grad=True)
        policy.predict(latents, torch.tensor([400.0]), prompts).square().mean().backward()
        assert latents.grad is not None
        return latents.grad

    kind, latents = type(policy.family), torch.randn(3, 4, 8, 8)
    cut = gradient(type("Mine", (kind,), {}))
    with pytest.raises(InputError, match=r"^Mine: mid_block.\S+.ff.net\S+ and 1 more layers run without grad"):
        check_family(policy, latents)
    whole = gradient(type("Mine", (kind,), {"train_mode": True}))
    check_family(policy, latents)
    policy.eval()
    assert not policy.network.training
    assert (whole - cut).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("name", rotated_after(1, ["sdxl", "sd35"]))
def test_frozen_weights_in_bfloat16_leave_the_adapter_in_float32(name: str) -> None:
    full, half = (perturbed(tiny_source(name, frozen_dtype=kind).load()) for kind in ("float32", "bfloat16"))
    assert {str(p.dtype) for p in half.network.parameters() if not p.requires_grad} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in half.parameters() if p.requires_grad} == {"torch.float32"}
    torch.testing.assert_close(prediction(half).float(), prediction(full), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        conditioning = half.encode_prompts(["a cat"])
        half.predict(torch.ones(1, 4, 8, 8), torch.tensor([400.0]), conditioning).float().mean().backward()
    for key, parameter in half.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(policy: Policy) -> list[Tensor]:
        perturbed(policy).predict(torch.ones(1, 4, 8, 8), torch.tensor([400.0]), empty(policy)).mean().backward()
        return [p.grad for p in policy.parameters() if p.requires_grad]

    plain, recomputed = (gradients(tiny_source("sd35", gradient_checkpointing=on).load()) for on in (False, True))
    torch.testing.assert_close(plain, recomputed)


def empty(policy: Policy) -> Conditioning:
    return policy.encode_prompts([""])


def test_sizes_that_the_network_cannot_take_are_refused() -> None:
    assert tiny_source("sd15").load().latent_shape(18, None) == (4, 9, 8)
    with pytest.raises(InputError, match="height=18 must be a positive multiple of 4 pixels"):
        tiny_source("sd35_no_t5").load().latent_shape(18, None)
    with pytest.raises(InputError, match="guidance_scale=2 needs the encoded empty prompt"):
        policy = tiny_source("sd15").load()
        policy.predict_guided(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), empty(policy), None, 2.0)


def edited(name: str, folder: Path, file: str, old: str, new: str) -> PolicySource:
    copytree(pipeline_folder(name), folder)
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return tiny_source(name, source=str(folder))


def test_wrong_sources_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    flux = edited(
        "sd35", tmp_path / "flux", "transformer/config.json", "SD3Transformer2DModel", "FluxTransformer2DModel"
    )
    with pytest.raises(InputError, match=r"takes 4 channels|of no known family"):
        flux.load()
    inpainting = edited("sd15", tmp_path / "inpaint", "unet/config.json", '"in_channels": 4', '"in_channels": 9')
    with pytest.raises(InputError, match="takes 9 channels"):
        inpainting.load()
    without_vae = edited(
        "sd15", tmp_path / "vae", "model_index.json", '"vae": [\n    "diffusers"', '"vae": [\n    null'
    )
    with pytest.raises(InputError, match="without a vae"):
        without_vae.load()
    with pytest.raises(InputError, match="does not exist"):
        PolicySource("/none/at/all").load()
    with pytest.raises(InputError, match=r"lora.target_modules=\['nowhere'\]"):
        tiny_source("sd15", lora=LoRA(2, 2.0, target_modules=["nowhere"])).load()
    with pytest.raises(InputError, match=r"^lora.target_modules=\[\]: "):
        tiny_source("sd15", lora=LoRA(2, 2.0, target_modules=[])).load()
    with pytest.raises(InputError, match="t5_length=-1"):
        tiny_source("sd35", t5_length=-1).load()


def test_zeros_for_sdxl_are_diffusers_default(tmp_path: Path) -> None:
    source = edited("sdxl", tmp_path / "xl", "model_index.json", '"force_zeros_for_empty_prompt": true', '"note": true')
    assert not source.load().encode_uncond().prompt_embeds.any()
    source = edited("sdxl", tmp_path / "xl2", "model_index.json", '_prompt": true', '_prompt": false')
    assert source.load().encode_uncond().prompt_embeds.any()


def test_the_empty_prompt_is_encoded_once_for_a_place_a_precision_and_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = tiny_source("sd15").load(), []
    encode = policy.text_encoder.encode_ids
    monkeypatch.setattr(policy.text_encoder, "encode_ids", lambda *ids: asked.append(ids) or encode(*ids))
    first = policy.encode_uncond()
    assert policy.encode_uncond() is first
    assert len(asked) == 1
    with torch.inference_mode():
        assert torch.equal(policy.encode_uncond().prompt_embeds, first.prompt_embeds)
    assert not policy.encode_uncond().prompt_embeds.is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(policy.encode_uncond().prompt_embeds.float(), first.prompt_embeds)
    policy.to(torch.bfloat16)
    assert policy.encode_uncond().prompt_embeds.dtype == torch.bfloat16
    with torch.no_grad():
        next(policy.text_encoder.parameters()).zero_()
    policy.encode_uncond()
    assert len(asked) == 6


@pytest.mark.parametrize("name", ["sd_tiny", "sd35_tiny"])
def test_shipped_generators_are_policies(name: str) -> None:
    policy = PolicySource(name).load()
    assert prediction(policy).isfinite().all()
    assert policy.vae.decode(torch.zeros(1, *policy.latent_shape())).shape[1] == 3


def test_meta_device_shows_the_shapes_of_a_policy() -> None:
    with torch.device("meta"):
        policy = tiny_source("sdxl").load()
    assert all(parameter.is_meta for parameter in policy.parameters())
