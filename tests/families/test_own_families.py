"""Families of one's own: as their pipelines, and with every command."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from latentreward.contracts import PromptBatch
from latentreward.policies import PolicySource
from latentreward.rollout import Sampling, sample_latents
from tests.families import own_families
from tests.families.twins import PROMPTS, GivenNoise, noise_for
from tests.tiny_pipelines import randomise

SANA = {"complex_human_instruction": None, "use_resolution_binning": False}
FAMILIES = {
    "Chroma": (own_families.chroma_pipeline, {}, (32, 48)),
    "Sana": (own_families.sana_pipeline, SANA, (64, 96)),
    "PixArt": (own_families.pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False}, (32, 48)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    pipeline = FAMILIES[request.param][0]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    folder = tmp_path_factory.mktemp("own") / "pipeline"
    pipeline.save_pretrained(folder)
    return request.param, folder


def test_own_family_samples_as_its_pipeline(case):
    name, folder = case
    _, call, (height, width) = FAMILIES[name]
    policy = PolicySource(str(folder), family=f"{own_families.__name__}.{name}").load().eval()
    noise = noise_for(policy.latent_shape(height, width))
    sampling, guidance = Sampling(4, height=height, width=width), policy.family.default_guidance
    prompts = PromptBatch(PROMPTS, keys=PROMPTS)
    ours = sample_latents(policy, prompts, sampling, guidance, 0, draws=GivenNoise(noise))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    settings = {"height": height, "width": width, "num_inference_steps": 4, "guidance_scale": guidance, **call}
    for row, prompt in enumerate(PROMPTS):
        given = noise[row : row + 1]
        packed = policy.family.pack(given) if name == "Chroma" else given
        theirs = pipeline(prompt=[prompt], latents=packed, output_type="latent", **settings).images
        theirs = policy.family.unpack(theirs, policy.family.token_grid(given)) if name == "Chroma" else theirs
        torch.testing.assert_close(ours[row], theirs[0], rtol=1e-4, atol=1e-4)
