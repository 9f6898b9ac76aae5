"""DDIM steps: diffusers' own scheduler as oracle, the forward process as closed form, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from latentreward.alignment import DDIMSampler
from latentreward.core.errors import InputError
from latentreward.diffusion import DDPM

CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHAPE = (2, 4, 3, 3)
VARIANTS = {
    "sd15": {},
    "v": {"prediction_type": "v_prediction"},
    "sdxl_euler": {"timestep_spacing": "linspace", "set_alpha_to_one": True, "steps_offset": 0},
    "trailing_zero_snr": {
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
}


def tensors(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_equals_diffusers(variant: str, steps: int, eta: float) -> None:
    config = CONFIG | VARIANTS[variant]
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sampler = DDIMSampler(config, steps, eta)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    for index, timestep in enumerate(scheduler.timesteps):
        latents, output, noise = tensors(index, 3)
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
        timesteps = timestep.expand(2)
        found = sampler.transition(latents, output, timesteps).sample(noise)
        if (
            scheduler.alphas_cumprod[timestep] == 0 and eta == 1
        ):  # diffusers takes the root of what rounding leaves of 0
            assert found.isfinite().all()
            continue
        torch.testing.assert_close(found, expected.prev_sample, rtol=1e-5, atol=1e-5)
        clean = sampler.clean(latents, output, timesteps)
        torch.testing.assert_close(clean, expected.pred_original_sample, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_network_keeps_the_marginals(kind: str, eta: float) -> None:
    """With the true noise of x_0, the next state has mean √ᾱ' x_0 and variance 1 − ᾱ' (arXiv:2010.02502, eq. 7)."""
    sampler = DDIMSampler(CONFIG | {"prediction_type": kind}, 20, eta)
    process = DDPM.from_config(CONFIG | {"prediction_type": kind})
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 4, generator=generator)
    latents_0 = clean[..., None].expand(1, 4, 20_000)
    noise, fresh = (torch.randn(1, 4, 20_000, generator=generator) for _ in range(2))
    for index in (0, 9, 18):
        timesteps = sampler.timesteps[index : index + 1]
        latents = process.add_noise(latents_0, noise, timesteps)
        transition = sampler.transition(latents, process.target(latents_0, noise, timesteps), timesteps)
        following = transition.sample(fresh)
        alpha = process.alphas_cumprod[int(sampler.timesteps[index + 1])]
        torch.testing.assert_close(following.mean(dim=-1), alpha.sqrt() * clean, rtol=0, atol=0.03)
        torch.testing.assert_close(following.var(dim=-1), (1 - alpha).expand(1, 4), rtol=0.05, atol=0)


@pytest.mark.parametrize("config", [{"set_alpha_to_one": True}, {"steps_offset": 0}])
def test_last_step_may_have_no_noise(config: dict[str, Any]) -> None:
    std = DDIMSampler(CONFIG | config, 20).noise_std
    assert std[-1] == 0
    assert (std[:-1] > 0).all()


def test_rows_do_not_see_each_other() -> None:
    sampler = DDIMSampler(CONFIG, 20)
    latents, output = tensors(0, 2)
    timesteps = sampler.timesteps[[3, 17]]
    both = sampler.transition(latents, output, timesteps)
    for row in range(2):
        alone = sampler.transition(latents[row : row + 1], output[row : row + 1], timesteps[row : row + 1])
        assert torch.equal(alone.mean[0], both.mean[row])
        assert torch.equal(alone.std[0], both.std[row])


def test_float32_whatever_comes_in() -> None:
    sampler = DDIMSampler(CONFIG, 20)
    latents, output = (tensor.bfloat16() for tensor in tensors(0, 2))
    timesteps = sampler.timesteps[[3, 17]]
    expected = sampler.transition(latents.float(), output.float(), timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        found = sampler.transition(latents, output, timesteps)
        assert sampler.clean(latents, output, timesteps).dtype == torch.float32
    assert found.mean.dtype == torch.float32
    assert torch.equal(found.mean, expected.mean)


def test_timesteps_of_another_schedule_are_refused() -> None:
    latents, output = tensors(0, 2)
    with pytest.raises(InputError, match="timestep 940 is none of the 20 steps"):
        DDIMSampler(CONFIG, 20).transition(latents, output, torch.tensor([951, 940]))


def test_deterministic_samplers_have_no_log_probability() -> None:
    DDIMSampler(CONFIG, 20, 0.1).require_noise()
    with pytest.raises(InputError, match=r"sampling.eta=0 none of the 20 steps adds noise"):
        DDIMSampler(CONFIG, 20, 0.0).require_noise()
