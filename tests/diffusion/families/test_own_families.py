"""Families of one's own sample as their pipelines do."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.alignment import PolicySource, Sampling, sample_latents
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import ContinuousFlow, find_family
from latentreward.reward import CLIPProjectionHead, RewardModel
from latentreward.testing import check_apart, check_predictions
from tests.diffusion.families import own_families
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.twins import PROMPTS, GivenNoise, noise_for
from tests.tiny_pipelines import pipeline_folder, randomise


def test_own_family_samples_as_its_pipeline(tmp_path: Path) -> None:
    height, width, call = 32, 48, {"use_resolution_binning": False, "clean_caption": False}
    torch.manual_seed(0)
    pipeline, path = own_families.pixart_pipeline(), f"{own_families.__name__}.PixArt"
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


def test_a_plain_unet_samples_as_stable_diffusion() -> None:
    sources = [
        PolicySource(pipeline_folder("sd15"), family=path) for path in (f"{own_families.__name__}.PlainUNet", None)
    ]
    policies = [source.load().eval() for source in sources]
    noise = noise_for(policies[0].latent_shape(32, 32))
    drawn = (PromptBatch(PROMPTS, keys=PROMPTS), Sampling(3, height=32, width=32), 5.0, 0)
    found, wanted = (sample_latents(policy, *drawn, draws=GivenNoise(noise)) for policy in policies)
    torch.testing.assert_close(found, wanted)
    assert policies[0].family.noise_process.sigmas.equal(policies[1].family.noise_process.sigmas)


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
