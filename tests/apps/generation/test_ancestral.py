import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from latentreward.apps.generation.step_search import levels_of
from latentreward.core.errors import InputError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 10


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("index", [0, 4, 8])
def test_a_ddim_step_without_noise_becomes_the_one_with_it(prediction_type: str, index: int) -> None:
    """diffusers' own stochastic DDIM step, from the same prediction, is the oracle."""
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[index]
    latents, output, noise = draw(2, 4, 8, 8), draw(2, 4, 8, 7)[..., :1].expand(2, 4, 8, 8), draw(2, 4, 8, 9)[..., :8]
    plain = scheduler.step(output, timestep, latents, eta=0.0).prev_sample
    noisy = scheduler.step(output, timestep, latents, eta=0.7, variance_noise=noise).prev_sample
    step = levels_of(scheduler, float(timestep)).ancestral(latents, plain, eta=0.7)
    torch.testing.assert_close(step.sample(noise), noisy, atol=2e-5, rtol=1e-5)


def test_eulers_coordinates_give_the_same_step_as_ddims() -> None:
    """x/√(1 + σ²) of Euler's state is DDIM's, so equal predictions lead to equal distributions."""
    ddim = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading", steps_offset=1)
    euler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    for scheduler in (ddim, euler):
        scheduler.set_timesteps(STEPS)
    assert ddim.timesteps.tolist() == euler.timesteps.tolist()
    latents, output = draw(1, 4, 8, 8), draw(1, 4, 8, 6)[..., :1].expand(1, 4, 8, 8)
    index, timestep = 3, ddim.timesteps[3]
    sigma, next_sigma = euler.sigmas[index], euler.sigmas[index + 1]
    euler.set_begin_index(index)
    scaled = latents * (1 + sigma**2).sqrt()
    euler.scale_model_input(scaled, euler.timesteps[index])
    after = euler.step(output, euler.timesteps[index], scaled).prev_sample
    levels = levels_of(euler, float(timestep))
    ours = levels.ancestral(scaled, after, eta=1.0)
    theirs = levels_of(ddim, float(timestep)).ancestral(latents, ddim.step(output, timestep, latents).prev_sample, 1.0)
    assert levels.next_scale == pytest.approx(float((1 + next_sigma**2) ** -0.5))
    torch.testing.assert_close(ours.mean * levels.next_scale, theirs.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.std * levels.next_scale, theirs.std, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("index", range(STEPS))
def test_a_flow_step_keeps_the_marginal(index: int) -> None:
    """With a perfect prediction, states of level σ go to states of level σ' — exactly, whatever η."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(index)
    sigma, next_sigma = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    clean, noise = draw(20_000, 1, 1, 1) * 0 + 0.7, draw(20_000, 1, 2, 1)[:, :, :1]
    latents = (1 - sigma) * clean + sigma * noise
    after = scheduler.step(noise - clean, scheduler.timesteps[index], latents).prev_sample
    step = levels_of(scheduler, float(scheduler.timesteps[index])).ancestral(latents, after, eta=1.0)
    drawn = step.sample(draw(20_000, 1, 3, 1)[:, :, :1])
    assert drawn.mean().item() == pytest.approx(float((1 - next_sigma) * 0.7), abs=0.03)
    assert drawn.std().item() == pytest.approx(float(next_sigma), abs=0.02)
    assert (step.std[0] > 0) == (index < STEPS - 1)


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(InputError, match="PNDMScheduler does not take; use DDIMScheduler"):
        levels_of(PNDMScheduler(), 1.0)
    with pytest.raises(InputError, match="clip_sample"):
        levels_of(DDIMScheduler(), 1.0)
