"""Stochastic steps of flow matching: diffusers' Euler step, the marginals of the flow, and what is refused."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from latentreward.alignment import FlowSDESampler
from latentreward.diffusion.noise.schedules import static_levels

CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}
SHAPE = (2, 4, 3, 3)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"shift": 1.0}, CONFIG | {"use_karras_sigmas": True}], ids=str)
def test_without_noise_it_is_diffusers_euler_step(config: dict[str, Any], steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sampler = FlowSDESampler(*static_levels(config, steps), 0.0)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    for timestep in scheduler.timesteps:
        generator = torch.Generator().manual_seed(int(timestep))
        latents, output = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        expected = scheduler.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(sampler.transition(latents, output, timestep.expand(2)).mean, expected)


@pytest.mark.parametrize(
    ("kind", "noise_level", "spread", "mean", "std", "log_prob"),
    [
        # w = 0.7·√(0.8 / 0.2), w² / 2σ = 1.225: 2·(1 − 1.225·0.3) + 0.5·(1 + 1.225·0.2)·0.3
        ("flow", 0.7, 1.4, 1.45175, 0.766812, -0.826960),
        # w² / 2σ = 0.05625: 2·(1 − 0.05625·0.3) + 0.5·(1 + 0.05625·0.2)·0.3
        ("dance", 0.3, 0.3, 2.1179375, 0.164317, -22.257132),
    ],
)
def test_a_step_by_hand(kind: Any, noise_level: float, spread: float, mean: float, std: float, log_prob: float) -> None:
    """From x = 2 with v = −0.5 at σ = 0.8 to σ' = 0.5, and the density −(x' − μ)² / 2s² − log s − ½ log 2π at 1."""
    sampler = FlowSDESampler(torch.tensor([800.0, 500.0]), torch.tensor([0.8, 0.5, 0.0]), noise_level, kind)
    latents, velocity, timesteps = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), -0.5), torch.tensor([800.0])
    step = sampler.transition(latents, velocity, timesteps)
    found = (step.spread, step.mean, step.std, sampler.noise_std[0], step.log_prob(torch.ones(1, 1, 1)))
    assert [one.item() for one in found] == pytest.approx([spread, mean, std, std, log_prob], rel=1e-5)
    assert sampler.clean(latents, velocity, timesteps).item() == pytest.approx(2.4)


@pytest.mark.parametrize(("steps", "shift"), [(3, 5.0), (10, 3.0)])
def test_noise_is_that_of_the_released_code(steps: int, shift: float) -> None:
    """Flow-GRPO's code takes the second level in the denominator where σ is 1, and nowhere else."""
    timesteps, sigmas = static_levels({"shift": shift}, steps)
    sigmas[0] -= 1e-6  # as UniPC's, where the released code would add a thousand times the noise
    sigma = sigmas[:-1].double()
    denominator = 1 - torch.where(torch.arange(steps) == 0, sigma[1], sigma)
    wanted = 0.7 * (sigma / denominator * -sigmas.double().diff()).sqrt()
    torch.testing.assert_close(FlowSDESampler(timesteps, sigmas).noise_std, wanted.float(), rtol=1e-4, atol=0)


def test_many_small_steps_keep_the_marginals() -> None:
    """Clean data N(0, s²) have the velocity E[ε − x_0 | x] = x·(σ − (1 − σ)s²)/((1 − σ)²s² + σ²); with it the standard
    deviation at the end is s, with noise as without."""
    spread, draws = 0.5, 20_000
    for noise_level in (0.0, 0.7):
        sampler = FlowSDESampler(*static_levels({"shift": 1.0}, 200), noise_level)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, draws, generator=generator)
        for timestep in sampler.timesteps:
            sigma = timestep / 1000
            variance = (1 - sigma) ** 2 * spread**2 + sigma**2
            velocity = latents * (sigma - (1 - sigma) * spread**2) / variance
            transition = sampler.transition(latents, velocity, timestep.expand(1))
            latents = transition.sample(torch.randn(1, draws, generator=generator))
        assert latents.std().item() == pytest.approx(spread, rel=0.05), noise_level
        assert latents.mean().item() == pytest.approx(0.0, abs=0.02), noise_level


def test_float32_whatever_comes_in() -> None:
    sampler = FlowSDESampler(*static_levels(CONFIG, 10))
    generator = torch.Generator().manual_seed(0)
    latents, output = (torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(2))
    expected = sampler.transition(latents.float(), output.float(), sampler.timesteps[[0, 9]])
    with torch.autocast("cpu", torch.bfloat16):
        found = sampler.transition(latents, output, sampler.timesteps[[0, 9]])
    assert torch.equal(found.mean, expected.mean)
    assert found.mean.dtype == found.std.dtype == torch.float32


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
def test_a_step_of_cps_is_its_formula(noise_level: float) -> None:
    """x̂_0 = x − σ v and ε̂ = x + (1 − σ) v: the velocity is ε − x_0."""
    timesteps, sigmas = static_levels(CONFIG, 4)
    sampler = FlowSDESampler(timesteps, sigmas, noise_level, "cps")
    latents, velocity = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for step in range(4):
        sigma, after = sigmas[step].item(), sigmas[step + 1].item()
        spread = after * math.sin(noise_level * math.pi / 2)
        clean, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        found = sampler.transition(latents, velocity, timesteps[step].expand(2))
        mean = (1 - after) * clean + math.sqrt(max(after**2 - spread**2, 0)) * noise
        torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-4)
        assert found.std.tolist() == pytest.approx([spread] * 2, abs=1e-6)
