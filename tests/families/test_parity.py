"""Sampling equals diffusers' own pipelines: text, levels, guidance, network, latents and pictures at once."""

import numpy as np
import torch

from latentreward.contracts import PromptBatch
from latentreward.rollout import Sampling, sample_latents
from tests.families.twins import PROMPTS, GivenNoise, Twin, every_network, every_twin, noise_for

STEPS = 4


def ours(twin: Twin, prompts: tuple[str, ...], noise: torch.Tensor) -> torch.Tensor:
    policy = twin.source().load().eval()
    height, width = twin.size
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
    noise = noise_for(twin.source().resolve_family().latent_shape(*twin.size))
    want = twin.sample(twin.pipeline(), PROMPTS, noise, STEPS)
    assert_near(ours(twin, PROMPTS, noise), want)


@every_twin
def test_prompts_of_unequal_length_in_a_batch_equal_single_ones(twin: Twin) -> None:
    noise = noise_for(twin.source().resolve_family().latent_shape(*twin.size))
    together = ours(twin, PROMPTS, noise)
    for row, prompt in enumerate(PROMPTS):
        assert_near(together[row : row + 1], ours(twin, (prompt,), noise[row : row + 1]))


@every_network
def test_decoded_pictures(twin: Twin) -> None:
    policy = twin.source().load().eval()
    noise = noise_for(policy.latent_shape(*twin.size))
    want = np.asarray(twin.sample(twin.pipeline(), PROMPTS, noise, STEPS, "np"))
    want = (want.reshape(len(PROMPTS), *want.shape[-3:]) * 255).round()
    with torch.no_grad():
        pixels = policy.vae.decode(ours(twin, PROMPTS, noise))
    found = ((pixels.clamp(-1, 1) / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(found - want).max() <= 1
    assert (found == want).mean() >= 0.999
