"""Families of one's own sample as their pipelines do."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file

from latentreward.alignment import PolicySource, Sampling, TrainedLoRA, sample_latents, write_merged
from latentreward.apps.estimate.shapes import ShapesOnly
from latentreward.apps.generation import load_lora, policy_of
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import ContinuousFlow, FlowFamily, LoRA, find_family
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.weights import settle
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead
from latentreward.reward.scoring.network import RewardNetwork
from tests.alignment.policies.alignment import perturbed
from tests.diffusion.families import own_families
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.twins import PROMPTS, GivenNoise, noise_for
from tests.tiny_pipelines import randomise

SANA = {"complex_human_instruction": None, "use_resolution_binning": False}
FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], tuple[int, int]]] = {
    "Chroma": (own_families.chroma_pipeline, {}, (32, 48)),
    "Sana": (own_families.sana_pipeline, SANA, (64, 96)),
    "PixArt": (own_families.pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False}, (32, 48)),
}


@pytest.mark.parametrize("name", [pytest.param("Chroma", marks=pytest.mark.slow), "Sana", "PixArt"])
def test_own_family_samples_as_its_pipeline(name: str, tmp_path: Path) -> None:
    build, call, (height, width) = FAMILIES[name]
    torch.manual_seed(0)
    pipeline, path = build(), f"{own_families.__name__}.{name}"
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    pipeline.save_pretrained(tmp_path)
    policy = policy_of(pipeline, path).eval()
    family, policy.text_encoder = policy.family, find_family(PipelineSource(str(tmp_path)), path).load_prompt_encoder()
    settle(policy.text_encoder, torch.float32, torch.float32)
    noise, guidance = noise_for(policy.latent_shape(height, width)), family.default_guidance
    drawn = (PromptBatch(PROMPTS, keys=PROMPTS), Sampling(4, height=height, width=width), guidance, 0)
    ours = sample_latents(policy, *drawn, draws=GivenNoise(noise))
    settings = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": guidance, **call}
    packed = name == "Chroma"
    for row, prompt in enumerate(PROMPTS):
        given = noise[row : row + 1]
        latents = family.pack(given) if packed else given
        theirs = pipeline(prompt=[prompt], latents=latents, output_type="latent", **settings).images
        theirs = family.unpack(theirs, family.token_grid(given)) if packed else theirs
        torch.testing.assert_close(ours[row], theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_network_without_a_lora_loader_in_diffusers_is_trained_exported_and_merged(tmp_path: Path) -> None:
    build, _, _ = FAMILIES["PixArt"]
    pipeline, path = build(), f"{own_families.__name__}.PixArt"
    pipeline.save_pretrained(tmp_path / "base")
    source = PolicySource(str(tmp_path / "base"), family=path, lora=LoRA(2, 4.0))
    lora = TrainedLoRA.of_policy(perturbed(source.load()))
    with pytest.raises(InputError, match="diffusers has no LoRA loader for PixArt-Sigma; use format=peft"):
        lora.write_diffusers(tmp_path)
    folder = lora.write(tmp_path / "lora")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    policy = source.load()
    load_lora(policy, folder)
    read = PeftModel.from_pretrained(pipeline.transformer, folder)
    merged = load_file(
        next((write_merged(lora, source.pipeline(), tmp_path / "merged") / "transformer").glob("*.safet*"))
    )
    plain = load_file(next((tmp_path / "base" / "transformer").glob("*.safetensors")))
    for layer, (down, up) in lora.pairs.items():
        want = 2 * up @ down
        for network in (policy.network, read.base_model.model):
            found = network.get_submodule(layer)
            torch.testing.assert_close(found.get_delta_weight(found.active_adapters[0]), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged[f"{layer}.weight"] - plain[f"{layer}.weight"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "near"), [("native_sizes", "native_size"), ("constant_txt", "constant_text")])
def test_a_misspelt_member_is_told(name: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, path = made_configs("DDIMScheduler"), f"{own_families.__name__}.PixArt"
    monkeypatch.setattr(own_families.PixArt, "inputs", None, raising=False)  # a helper of the user's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_family(configs, path)
    monkeypatch.setattr(own_families.PixArt, name, None, raising=False)
    with pytest.warns(UserWarning, match=rf"^family: PixArt.{name} is no member of a family; did you mean {near}\?$"):
        find_family(configs, path)


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("text_field", "joint_attention_dim", "^family: PixArt.text_field is 'joint_attention_dim', which is not in "),
        ("text_field", "attention_head_dim", " but the transformer takes 16; .*, or PixArt needs another text_field$"),
        ("pooled_dim", 5, " but the transformer takes 5; .*, or PixArt needs another pooled_dim$"),
    ],
)
def test_a_width_of_the_text_encoder_names_the_familys_member(
    member: str, value: Any, message: str, pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, member, value)
    with pytest.raises(InputError, match=message):
        PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()


def test_text_narrower_than_the_image_has_a_width_of_its_own(pixart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = own_families.PixArt.split

    def narrow(*given: Any) -> Any:
        visual, text = split(*given)
        return visual, text[..., :24]

    monkeypatch.setattr(own_families.PixArt, "split", narrow)
    given = torch.zeros(2, 4, 8, 8), torch.full((2,), 500.0)
    for width in (32, 24):
        monkeypatch.setattr(own_families.PixArt, "text_width", width)
        backbone = own_families.own_pixart(pixart, visual_taps=[2], text_taps=[2])
        network = RewardNetwork(backbone, GatedQFormerHead(backbone.feature_spec, num_queries=2, num_heads=2))
        text = network.encode_prompts(PROMPTS)
        if width == 32:
            with pytest.raises(InputError, match=r"returned text tap 0 \(2, 32, 24\); .* as feature_spec"):
                network(*given, *text)
        else:
            assert network(*given, *text).shape == (2,)


def test_gradient_checkpointing_that_a_network_lacks_is_named_by_its_setting(
    pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixArtTransformer2DModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"^gradient_checkpointing=True: PixArtTransformer2DModel does not support it"):
        PolicySource(pixart, family=f"{own_families.__name__}.PixArt", gradient_checkpointing=True).load()


def made_configs(scheduler: str, **settings: Any) -> MadeConfigs:
    vae = {"latent_channels": 4, "block_out_channels": [8], "scaling_factor": 0.2}
    parts = {"transformer": {"caption_channels": 8, "in_channels": 4}, "vae": vae}
    parts |= {"scheduler": {"_class_name": scheduler, **settings}}
    return MadeConfigs(parts, _class_name="PixArtSigmaPipeline")


def test_classes_of_blocks_that_are_not_named_are_told(pixart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_families.PixArt, "block_classes", ())
    with pytest.raises(
        InputError, match=r"PixArt.block_classes is \(\), which lacks BasicTransformerBlock, of the blocks"
    ):
        PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()


def test_a_dynamic_shift_without_mu_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_families.Chroma, "mu", FlowFamily.mu)
    family = own_families.Chroma(made_configs("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True))
    with pytest.raises(
        InputError, match=r"Chroma.mu returns None; let it return the logarithm of the pipeline's shift"
    ):
        FlowFamily.levels(family, 4, (16, 4, 4))


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("lora_loader", "PixArtLoraLoaderMixin", "is not in diffusers.loaders"),
        ("lora_loader", "FluxLoraLoaderMixin", "PixArtSigmaPipeline is not derived from; set it to None"),
        ("vae_class", "AutoencoderNone", "is not in diffusers"),
        ("network_class", "PixArtTransformer4DModel", "is not in diffusers"),
        ("block_classes", ("PixArtBlock",), "is not in diffusers.models.transformers.pixart_transformer_2d"),
        ("text_field", "caption_chanels", "is not in source='made configs': transformer"),
        ("title", "", "must be a text"),
        ("name", None, "must be a text"),
        ("native_size", 128, "must be (height, width) in pixels"),
        ("native_size", (128, 128.0), "must be (height, width) in pixels"),
        ("default_guidance", "3.5", "must be a number or None"),
        ("lora_targets", "to_q", "must be a tuple of names"),
        ("lists", "transformer_blocks", "must be a tuple of names"),
        ("lists", (), "must name the network's lists of blocks"),
        ("packing", "2", "must be a whole number of at least 1"),
        ("packing", 0, "must be a whole number of at least 1"),
        ("max_side", 64.0, "must be a whole number of at least 1, or None"),
        ("max_prompt", "77", "must be a whole number of at least 1, or None"),
        ("unread_outside", ("caption_projection",), "must be a method"),
        ("unread", None, "must be a method"),
        ("part", "unet", "source='made configs' lacks; set part = 'transformer'"),
    ],
)
def test_a_wrong_name_of_a_family_is_told_before_anything_is_loaded(
    field: str, value: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, field, value)
    configs = made_configs("DDIMScheduler")
    with pytest.raises(InputError, match=r"^family: PixArt") as refused:
        find_family(configs, f"{own_families.__name__}.PixArt")
    assert str(refused.value) == f"family: PixArt.{field} is {value!r}, which {fault}"


@pytest.mark.parametrize(
    ("found", "vae_class", "message"),
    [
        ("AutoencoderDC", "AutoencoderKL", "vae is of class 'AutoencoderDC', .*the vae_class and a latent_encoder"),
        ("AutoencoderDC", "AutoencoderDC", "vae is of class 'AutoencoderDC', which LatentEncoder does not read; "),
        ("AutoencoderKL", "AutoencoderKL", "vae lacks block_out_channels; get the pipeline as published"),
    ],
)
def test_a_vae_of_another_class_is_told_with_the_remedy(
    found: str, vae_class: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, "vae_class", vae_class)
    parts = made_configs("DDIMScheduler")._parts
    vae = {"_class_name": found, "latent_channels": 4, "encoder_block_out_channels": [8], "scaling_factor": 0.2}
    with pytest.raises(InputError, match=message):
        find_family(MadeConfigs({**parts, "vae": vae}), f"{own_families.__name__}.PixArt")


@pytest.mark.parametrize(
    ("flow", "scheduler", "settings", "fault"),
    [
        (True, "DDIMScheduler", {}, r"is not so of a network with a DDIMScheduler .*; set flow = False$"),
        (True, "UniPCMultistepScheduler", {"prediction_type": "epsilon"}, r"is not so of .*; set flow = False$"),
        (True, "UniPCMultistepScheduler", {"use_flow_sigmas": True}, None),
        (True, "DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, None),
        (True, "FlowMatchEulerDiscreteScheduler", {}, None),
        (False, "FlowMatchEulerDiscreteScheduler", {}, r"is not so of a network with .*; set flow = True$"),
        (False, "DDIMScheduler", {}, None),
        (False, "UniPCMultistepScheduler", {"use_flow_sigmas": True}, r"is not so of .*; set flow = True$"),
    ],
)
def test_a_flow_is_what_the_scheduler_says(
    flow: bool, scheduler: str, settings: dict[str, Any], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, "flow", flow)
    configs, path = made_configs(scheduler, **settings), f"{own_families.__name__}.PixArt"
    if fault:
        with pytest.raises(InputError, match=rf"^family: PixArt.flow is {flow}, which {fault}"):
            find_family(configs, path)
    else:
        process = find_family(configs, path).noise_process
        assert type(process).__name__ == ("ContinuousFlow" if flow else "DDPM")


def test_a_process_of_the_other_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_families.PixArt, "noise_process", ContinuousFlow())
    with pytest.raises(InputError, match=r"^family: PixArt.flow is False, which contradicts noise_process, a Contin"):
        find_family(made_configs("DDIMScheduler"), f"{own_families.__name__}.PixArt")


@pytest.mark.parametrize("name", ["sd15", "flux1", "sd"])
def test_the_name_of_a_family_of_this_package_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_families.PixArt, "name", name)
    configs = made_configs("DDIMScheduler")
    with pytest.raises(InputError, match=rf"^family: PixArt.name is '{name}', a name of this package; give another$"):
        find_family(configs, f"{own_families.__name__}.PixArt")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pixart")
    own_families.pixart_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lists", ("blocks",), "PixArt.lists names 'blocks', which is not in PixArtTransformer2DModel"),
        ("idle", ("attn.nothing",), "PixArt.idle names 'attn.nothing', which is not in PixArtTransformer2DModel"),
        ("lora_targets", ("to_quary",), r"PixArt.lora_targets=\['to_quary'\]: Target modules"),
    ],
)
def test_a_name_that_is_not_in_the_network_is_told_when_it_is_loaded(
    field: str, value: Any, message: str, pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, field, value)
    with pytest.raises(InputError, match=f"^family: {message}"):
        PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()


@pytest.mark.parametrize(
    ("field", "value"),
    [("unread", lambda self, *given: ("attn.nothing",)), ("tail", ("norm",)), ("time_embedding", ("time",))],
)
def test_a_name_that_is_not_in_the_network_is_told_when_a_reward_is_built(
    field: str, value: Any, pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, field, value)
    with pytest.raises(InputError, match=rf"^family: PixArt.{field} names '\S+', which is not in "):
        own_families.own_pixart(pixart, visual_taps=[2], text_taps=[])


def test_a_family_whose_blocks_mix_rows_is_named_in_the_first_batch(
    pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = own_families.own_pixart(pixart, visual_taps=[2], text_taps=[])
    network = RewardNetwork(backbone, CLIPProjectionHead(backbone.feature_spec, embed_dim=8))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = latents, torch.full((2,), 500.0), *network.encode_prompts(PROMPTS)
    network.read(*states)
    split = own_families.PixArt.split

    def mixing(*given: Any) -> Any:
        visual, text = split(*given)
        return visual - visual.mean(dim=0), text

    monkeypatch.setattr(own_families.PixArt, "split", mixing)
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone .*; compute each row"):
        RewardNetwork(backbone, network.head).read(*states)


def one_timestep(family: Any, network: Any, latents: Any, sigma: Any, *given: Any, method: Any) -> Any:
    return method(family, network, latents, sigma[:1].expand(len(sigma)), *given)


def test_a_family_with_one_timestep_for_all_rows_is_named_where_rows_share_it(
    pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = own_families.own_pixart(pixart, visual_taps=[2], text_taps=[])
    network = RewardNetwork(backbone, CLIPProjectionHead(backbone.feature_spec, embed_dim=8))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    method = own_families.PixArt.velocity
    monkeypatch.setattr(own_families.PixArt, "velocity", partialmethod(one_timestep, method=method))
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone .* timestep"):
        network.read(latents, torch.full((2,), 500.0), *network.encode_prompts(PROMPTS))


def test_a_policy_with_one_timestep_for_all_rows_is_named(pixart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()
    given = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500.0)
    text = policy.encode_prompts(["a", *PROMPTS])
    policy.predict(*given, text)
    policy._compared = False
    method = own_families.PixArt.velocity
    monkeypatch.setattr(own_families.PixArt, "velocity", partialmethod(one_timestep, method=method))
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone .* timestep"):
        policy.predict(*given, text)
    policy.predict(*given, text)  # compared once


def test_the_stand_ins_of_an_estimate_are_not_compared(pixart: str) -> None:
    policy = PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()
    given = torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), policy.encode_prompts(["a", *PROMPTS])
    shapes = ShapesOnly()
    shapes.replace_weights(policy)
    with shapes:
        assert policy.predict(*given).shape == (3, 4, 8, 8)
        policy.predict(shapes.stand_in((3, 4, 8, 8)), *given[1:])


VELOCITY = own_families.PixArt.velocity


def unmasked(self: Any, network: Any, latents: Any, sigma: Any, text: Any, guidance: Any) -> Any:
    text = replace(text, prompt_mask=torch.ones_like(text.prompt_mask))
    return VELOCITY(self, network, latents, sigma, text, guidance)


LENGTHS = {"unlike": ["a", "two dogs on a hill in the rain"], "equal": ["a cat", "a dog"]}


@pytest.mark.parametrize("prompts", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_family_whose_padding_counts_is_named_in_the_first_batch(
    prompts: list[str], pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = own_families.own_pixart(pixart, visual_taps=[2], text_taps=[])
    network = RewardNetwork(backbone, CLIPProjectionHead(backbone.feature_spec, embed_dim=8))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(own_families.PixArt, "velocity", unmasked)
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone .*; compute each row"):
        network.read(latents, torch.full((2,), 500.0), *network.encode_prompts(prompts))


def test_a_policy_whose_padding_counts_is_named_in_a_batch_of_one(pixart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((1,), 500.0)
    for prompt in ("", "a cat"):  # a prompt of one token keeps it
        policy.predict(*given, policy.encode_prompts([prompt]))
        policy._compared = False
    monkeypatch.setattr(own_families.PixArt, "velocity", unmasked)
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone .* outside the mask"):
        policy.predict(*given, policy.encode_prompts(["a cat"]))
