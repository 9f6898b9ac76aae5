"""Families of one's own sample as their pipelines do."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

from latentreward.alignment import PolicySource, Sampling, TrainedLoRA, sample_latents, write_merged
from latentreward.apps.generation import load_lora
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import ContinuousFlow, LoRA, find_family
from latentreward.reward import CLIPProjectionHead, RewardModel
from latentreward.testing import check_apart, check_predictions
from tests.alignment.policies.alignment import perturbed
from tests.diffusion.families import own_families
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.twins import PROMPTS, GivenNoise, noise_for
from tests.tiny_pipelines import randomise

SANA = {"complex_human_instruction": None, "use_resolution_binning": False}
FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], tuple[int, int]]] = {
    "Sana": (own_families.sana_pipeline, SANA, (64, 96)),
    "PixArt": (own_families.pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False}, (32, 48)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_own_family_samples_as_its_pipeline(name: str, tmp_path: Path) -> None:
    build, call, (height, width) = FAMILIES[name]
    torch.manual_seed(0)
    pipeline, path = build(), f"{own_families.__name__}.{name}"
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    pipeline.save_pretrained(tmp_path)
    policy = PolicySource(str(tmp_path), family=path).load().eval()
    noise, guidance = noise_for(policy.latent_shape(height, width)), policy.family.default_guidance
    drawn = (PromptBatch(PROMPTS, keys=PROMPTS), Sampling(4, height=height, width=width), guidance, 0)
    ours = sample_latents(policy, *drawn, draws=GivenNoise(noise))
    settings = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": guidance, **call}
    for row, prompt in enumerate(PROMPTS):
        latents = noise[row : row + 1]
        theirs = pipeline(prompt=[prompt], latents=latents, output_type="latent", **settings).images
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


def made_configs(scheduler: str, **settings: Any) -> MadeConfigs:
    vae = {"latent_channels": 4, "block_out_channels": [8], "scaling_factor": 0.2}
    parts = {"transformer": {"caption_channels": 8, "in_channels": 4}, "vae": vae}
    parts |= {"scheduler": {"_class_name": scheduler, **settings}}
    return MadeConfigs(parts, _class_name="PixArtSigmaPipeline")


@pytest.mark.parametrize(("field", "value"), [("name", "sd15"), ("name", "flux1"), ("noise_process", ContinuousFlow())])
def test_a_wrong_name_of_a_family_is_told_before_anything_is_loaded(
    field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_families.PixArt, field, value)
    with pytest.raises(InputError, match=rf"^family: PixArt.({field}|flow) is "):
        find_family(made_configs("DDIMScheduler"), f"{own_families.__name__}.PixArt")


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


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pixart")
    own_families.pixart_pipeline().save_pretrained(folder)
    return str(folder)


VELOCITY = own_families.PixArt.velocity


def unmasked(self: Any, network: Any, latents: Any, sigma: Any, text: Any, guidance: Any) -> Any:
    text = replace(text, prompt_mask=torch.ones_like(text.prompt_mask))
    return VELOCITY(self, network, latents, sigma, text, guidance)


def one_timestep(self: Any, network: Any, latents: Any, sigma: Any, *given: Any) -> Any:
    return VELOCITY(self, network, latents, sigma[:1].expand(len(sigma)), *given)


def mixed(self: Any, network: Any, latents: Any, *given: Any) -> Any:
    return VELOCITY(self, network, latents - latents.mean(dim=0), *given)


@pytest.mark.parametrize("velocity", [unmasked, one_timestep, mixed])
@pytest.mark.parametrize("part", ["reward", "policy"])
def test_a_family_whose_rows_depend_on_others_is_named(
    velocity: Any, part: str, pixart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = noise_for((4, 8, 8)), torch.full((2,), 500.0)
    if part == "policy":
        policy = PolicySource(pixart, family=f"{own_families.__name__}.PixArt").load()
        inputs, compare = (
            (policy.encode_prompts(PROMPTS), None),
            partial(check_predictions, policy.family, policy.network),
        )
    else:
        backbone = own_families.own_pixart(pixart, visual_taps=[2], text_taps=[])
        model = RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec, embed_dim=8))
        inputs, compare = model.encode_prompts(PROMPTS), partial(check_apart, backbone, model.head)
    monkeypatch.setattr(own_families.PixArt, "velocity", velocity)
    with pytest.raises(InputError, match=r"^PixArt.velocity returned values of a row alone"):
        compare(*given, *inputs)
