"""DDIM steps: diffusers' own scheduler as oracle, the forward process as closed form, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from latentreward.alignment import DDIMSampler
from latentreward.core.errors import InputError

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
    """With the true noise of x_0, the next state has mean √ᾱ' x_0 and variance 1 − ᾱ' (arXiv:2010.02502, eq. 7),
    of which η² (1 − ᾱ') / (1 − ᾱ) · (1 − ᾱ / ᾱ') is fresh (eq. 16)."""
    sampler = DDIMSampler(CONFIG | {"prediction_type": kind}, 20, eta)
    levels = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    clean = torch.tensor([[[0.7]], [[0.7]]], dtype=torch.float64)
    noise = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)  # one standard deviation to either side
    for index in range(20):
        timesteps = sampler.timesteps[index].expand(2)
        alpha, following = levels[timesteps[0].long()], levels[max(int(timesteps[0]) - 50, 0)]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        output = noise if kind == "epsilon" else signal * noise - spread * clean
        step = sampler.transition(signal * clean + spread * noise, output, timesteps)
        first, second = step.mean.flatten().tolist()
        fresh = eta**2 * (1 - following) / (1 - alpha) * (1 - alpha / following)
        assert (first + second) / 2 == pytest.approx(0.7 * following.sqrt().item(), rel=1e-4)
        assert step.std[0].item() == pytest.approx(fresh.sqrt().item(), rel=1e-4, abs=1e-6)
        kept = ((first - second) / 2) ** 2 + step.std[0].item() ** 2
        assert kept == pytest.approx(1 - following.item(), rel=1e-3, abs=1e-5)


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
