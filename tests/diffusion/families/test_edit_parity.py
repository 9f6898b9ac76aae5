"""Sampling of edits equals diffusers' pipelines, which also load the LoRA files of editors."""

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers.pipelines.flux import pipeline_flux_kontext

from latentreward.alignment import Sampling, TrainedLoRA, sample_latents
from latentreward.core.contracts import EditPrompt, ImageRef, PromptBatch
from latentreward.data import decode_image
from latentreward.data.images import png
from latentreward.diffusion import LoRA
from latentreward.diffusion.families import flux1
from tests.alignment.policies.alignment import perturbed
from tests.diffusion.families.made_qwen_image_edit import picture
from tests.diffusion.families.test_parity import STEPS, assert_near
from tests.diffusion.families.twins import PROMPTS, TWINS, GivenNoise, noise_for

SIZES = ((72, 100), (130, 66))  # width and height of the pictures of a prompt, in pixels
FEW = ((32, 64), (48, 48), (64, 32))


def edits(count: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[EditPrompt, ...]:
    """The prompts of :data:`PROMPTS`, each with ``count`` pictures of its own."""
    return tuple(
        EditPrompt(
            prompt, [ImageRef(f"{row}-{place}", png(picture(*sizes[place], 9 * row + place))) for place in range(count)]
        )
        for row, prompt in enumerate(PROMPTS)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("flux1_kontext", 1), ("klein_base", 1), ("klein_base", 2), ("klein_distilled", 2)]
)
def test_latents_and_lora_files(name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unlike lengths in one batch, with pictures of unlike sizes, equal single runs of the pipeline."""
    monkeypatch.setattr(flux1, "SOURCE_SIZES", FEW)  # else pictures have about 1024² pixels
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", FEW)
    twin = TWINS[name]
    policy, (height, width) = perturbed(twin.source(lora=LoRA(2, 5.0), source_size="pipeline").load()).eval(), twin.size
    file = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path)
    pipeline = twin.pipeline()
    prompts, noise = edits(count), noise_for(policy.latent_shape(height, width))
    sampling, scale = Sampling(STEPS, noise_level=0.0, height=height, width=width), policy.family.guidance(None)
    found = sample_latents(policy, PromptBatch(prompts, PROMPTS), sampling, scale, 0, draws=GivenNoise(noise))
    unlike = False
    for loaded in (False, True):
        if loaded:
            pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        for row, prompt in enumerate(prompts):
            images = [decode_image(source) for source in prompt.sources]
            given = replace(twin, call={**twin.call, "image": images if count > 1 else images[0]})
            want = given.sample(pipeline, [str(prompt)], noise[[row]], STEPS)
            if loaded:
                assert_near(found[[row]], want)
            unlike |= not loaded and (found[[row]] - want).abs().max() > 1e-3
    assert unlike
