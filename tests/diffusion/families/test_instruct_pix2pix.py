"""InstructPix2Pix: diffusers' pipelines, three passes and two scales, features, LoRA files, refusals."""

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from latentreward.alignment import Policy, PolicySource, Sampling, TrainedLoRA, sample_latents, write_kohya
from latentreward.core.contracts import EditPrompt, ImageRef, PromptBatch
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.data.images import to_pixels
from latentreward.diffusion import LoRA
from latentreward.diffusion.families.instruct_pix2pix import widened
from tests.alignment.policies.alignment import perturbed
from tests.diffusion.families.test_parity import assert_near
from tests.diffusion.families.twins import PROMPTS, GivenNoise, noise_for
from tests.marks import slow_after
from tests.tiny_pipelines import pipeline_folder, sd_unet

SIZE = (16, 24)
both = pytest.mark.parametrize("name", slow_after(1, ["ip2p_sd15", "ip2p_sdxl"]))


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def reference(image: Image.Image, name: str) -> ImageRef:
    image.save(data := BytesIO(), "PNG")
    return ImageRef(name, data=data.getvalue())


PICTURES = [picture(seed) for seed in range(2)]
EDITS = tuple(EditPrompt(PROMPTS[n], [reference(PICTURES[n], f"{n}.png")]) for n in range(2))


@cache
def policy_of(name: str, **options: Any) -> Policy:
    return PolicySource(pipeline_folder(name), lora=LoRA(2, 5.0), source_size="pipeline", **options).load().eval()


def diffusers_pipeline(name: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(policy: Policy, noise: torch.Tensor, scale: float | None) -> torch.Tensor:
    sampling = Sampling(4, height=SIZE[0], width=SIZE[1])
    batch = PromptBatch(EDITS, ("0", "1"))
    return sample_latents(policy, batch, sampling, policy.family.guidance(scale), 0, draws=GivenNoise(noise))


@both
@pytest.mark.parametrize(
    ("scale", "image_scale"), [(None, None), (3.0, 1.0), (1.0, None)], ids=["defaults", "other scales", "off"]
)
def test_sampling_equals_the_pipelines(name: str, scale: float | None, image_scale: float | None) -> None:
    policy, pipeline = policy_of(name, image_guidance_scale=image_scale), diffusers_pipeline(name)
    pipeline.scheduler = DDIMScheduler.from_config({**policy.family.scheduler_config, "clip_sample": False})
    noise = noise_for(policy.latent_shape(*SIZE))
    size = {"height": SIZE[0], "width": SIZE[1]} if name == "ip2p_sdxl" else {}
    scales = {"guidance_scale": scale or 7.5, "image_guidance_scale": image_scale or 1.5}
    made = pipeline(
        [*PROMPTS], image=PICTURES, latents=noise, num_inference_steps=4, output_type="latent", **scales, **size
    )
    assert_near(sampled(policy, noise, scale), made.images)


def test_the_image_scale_is_of_the_policys_settings() -> None:
    scales = [policy_of("ip2p_sd15", image_guidance_scale=scale).family.image_guidance_scale for scale in (None, 2.0)]
    assert scales == [1.5, 2.0]
    for name, scale, said in (
        ("sd15", 1.5, r"image_guidance_scale=1.5, but guidance of Stable Diffusion \(.*\) has one scale; leave it out"),
        ("ip2p_sd15", 0.5, "image_guidance_scale=0.5 must be at least 1 and finite; set guidance_scale: 1 to switch"),
    ):
        with pytest.raises(InputError, match=said):
            PolicySource(pipeline_folder(name), image_guidance_scale=scale).resolve_family()


@both
@torch.no_grad()
def test_features_equal_hooks_on_the_untouched_network(name: str) -> None:
    backbone = create_backbone(name, source=pipeline_folder(name), tuning="frozen", text_encoder_tuning="frozen")
    unet, latents = diffusers_pipeline(name).unet, noise_for((4, 8, 8))
    conditioning = backbone.encode_prompts(
        EDITS, [torch.stack([to_pixels(image.resize((16, 16))) for image in PICTURES])]
    )
    found: list[torch.Tensor] = []
    for layer in (unet.down_blocks[0].resnets[-1], unet.mid_block):
        layer.register_forward_hook(lambda layer, inputs, output: found.append(output))
    raw = conditioning.source_latents[0] / backbone.latent_space.scaling_factor
    extra = {"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    times = torch.tensor([300, 800])
    unet(torch.cat([latents, raw], dim=1), times, conditioning.prompt_embeds, added_cond_kwargs=extra)
    features = backbone(latents, times, conditioning)
    mid = found[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.visual[-1], mid)


@both
@pytest.mark.parametrize("kind", slow_after(1, ["diffusers", "kohya"]))
def test_the_exported_file_loads_in_diffusers(name: str, kind: str, tmp_path: Path) -> None:
    policy = perturbed(PolicySource(pipeline_folder(name), lora=LoRA(2, 5.0), source_size="pipeline").load()).eval()
    lora = TrainedLoRA.of_policy(policy)
    file = write_kohya(lora, tmp_path) if kind == "kohya" else lora.write_diffusers(tmp_path)
    pipeline, latents = diffusers_pipeline(name), noise_for(policy.latent_shape(*SIZE))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    given = latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(EDITS)
    with torch.no_grad():
        want = policy.predict(*given)
        policy.network = pipeline.unet
        torch.testing.assert_close(policy.predict(*given), want, rtol=1e-4, atol=1e-5)


def test_sources_that_do_not_fit_are_refused() -> None:
    policy, latents = policy_of("ip2p_sd15", image_guidance_scale=None), noise_for((4, 8, 8))
    times, plain = torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS)
    with pytest.raises(InputError, match="the U-Net takes 1 picture to edit, and 0 were given"):
        policy.predict(latents, times, plain)
    edits = policy.encode_prompts(EDITS)
    with pytest.raises(InputError, match=r"has 16 × 24 pixels and the one that is made 16 × 16, .* source_size: made"):
        policy.predict(latents, times, edits)
    with pytest.raises(InputError, match="the U-Net takes 0 pictures to edit, and 1 were given"):
        text_to_image = PolicySource(pipeline_folder("sd15")).load()
        text_to_image.predict(latents, times, edits)
    assert policy.family.source_size(17, 25) == ((16, 24), None)


@torch.no_grad()
def test_a_widened_network_at_first_predicts_as_before() -> None:
    unet, latents, text = sd_unet(), noise_for((4, 8, 8)), torch.randn(2, 3, 16)
    wide = widened(unet)
    found = wide(torch.cat([latents, noise_for((4, 8, 8), seed=1)], dim=1), 300, text).sample
    torch.testing.assert_close(found, unet(latents, 300, text).sample)
    assert wide.config.in_channels == 8 and wide.config.out_channels == 4
