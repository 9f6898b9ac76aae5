"""Families of one's own sample as their pipelines do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from latentreward.backbones.loading import PipelineSource
from latentreward.backbones.weights import settle
from latentreward.contracts import PromptBatch
from latentreward.families import find_family
from latentreward.generation import policy_of
from latentreward.rollout import Sampling, sample_latents
from tests.families import own_families
from tests.families.twins import PROMPTS, GivenNoise, noise_for
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
