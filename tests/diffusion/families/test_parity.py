"""Sampling equals diffusers' own pipelines: text, levels, guidance, network, latents and pictures at once."""

from functools import cache

import numpy as np
import torch

from latentreward.alignment import Policy, Sampling, sample_latents
from latentreward.core.contracts import PromptBatch
from tests.diffusion.families.twins import PROMPTS, TWINS, GivenNoise, Twin, every_network, every_twin, noise_for

STEPS = 4


@cache
def policy_of(name: str) -> Policy:
    return TWINS[name].source().load().eval()


@cache
def noise_of(name: str) -> torch.Tensor:
    return noise_for(policy_of(name).latent_shape(*TWINS[name].size))


@cache
def ours(name: str, prompts: tuple[str, ...] = PROMPTS, row: int | None = None) -> torch.Tensor:
    """Latents of prompts from the noise of all rows, or of one."""
    return sampled(TWINS[name], prompts, noise_of(name) if row is None else noise_of(name)[[row]])


def sampled(twin: Twin, prompts: tuple[str, ...], noise: torch.Tensor) -> torch.Tensor:
    """Latents of prompts from given noise, at the twin's guidance."""
    policy, (height, width) = policy_of(twin.name), twin.size
    sampling = Sampling(STEPS, noise_level=0.0, height=height, width=width)
    scale = policy.family.guidance(twin.guidance)
    batch = PromptBatch(prompts, prompts)
    return sample_latents(policy, batch, sampling, scale, 0, draws=GivenNoise(noise))


def assert_near(found: torch.Tensor, want: torch.Tensor) -> None:
    assert found.shape == want.shape
    worst, room = (found - want).abs().max().item(), 1e-5 * max(1.0, want.abs().max().item())
    assert worst <= room, f"{worst:g} > {room:g}"


@every_twin
def test_latents_after_four_steps(twin: Twin) -> None:
    want = twin.sample(twin.pipeline(), PROMPTS, noise_of(twin.name), STEPS)
    assert_near(ours(twin.name), want)


@every_twin
def test_prompts_of_unequal_length_in_a_batch_equal_single_ones(twin: Twin) -> None:
    for row, prompt in enumerate(PROMPTS):
        assert_near(ours(twin.name)[[row]], ours(twin.name, (prompt,), row))


@every_network
def test_decoded_pictures(twin: Twin) -> None:
    want = np.asarray(twin.sample(twin.pipeline(), PROMPTS, noise_of(twin.name), STEPS, "np"))
    want = (want.reshape(len(PROMPTS), *want.shape[-3:]) * 255).round()
    with torch.no_grad():
        pixels = policy_of(twin.name).vae.decode(ours(twin.name))
    found = ((pixels.clamp(-1, 1) / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(found - want).max() <= 1
    assert (found == want).mean() >= 0.999
