"""A converted state is exactly what the other noise process would have made of the same latents and noise."""

import torch
from torch import Tensor

from latentreward.alignment.rewards.latent import convert_states, same_levels, signal_and_noise
from latentreward.diffusion import FlowMatching, NoiseProcess, process_from_scheduler
from latentreward.diffusion.noise.processes import per_sample

SD = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion() -> NoiseProcess:
    return process_from_scheduler(SD)


def clean_and_noise(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, count, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()


def test_diffusion_states_become_flow_states() -> None:
    ddpm, flow = diffusion(), FlowMatching()
    timesteps = torch.tensor([0.0, 1.0, 251.0, 501.0, 801.0, 951.0, 999.0])
    clean, noise = clean_and_noise(len(timesteps))
    latents, found = convert_states(ddpm.add_noise(clean, noise, timesteps), timesteps, ddpm, flow)
    alpha_bar = ddpm.alphas_cumprod[timesteps.long()]
    sigma = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    level = per_sample(sigma, clean)
    torch.testing.assert_close(latents, (1 - level) * clean + level * noise, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, flow.timesteps_at(sigma))
    assert (flow.sigma(found) - sigma).abs().max() < 0.003  # half the widest gap of the table, and its least level


def test_flow_states_become_diffusion_states() -> None:
    ddpm, flow = diffusion(), FlowMatching()
    sigma = torch.tensor([0.05, 0.2, 0.5, 0.7345, 0.9])
    clean, noise = clean_and_noise(len(sigma))
    level = per_sample(sigma, clean)
    latents, found = convert_states((1 - level) * clean + level * noise, 1000 * sigma, flow, ddpm)
    norm = ((1 - sigma) ** 2 + sigma**2).sqrt()
    expected = per_sample((1 - sigma) / norm, clean) * clean + per_sample(sigma / norm, clean) * noise
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, ddpm.timesteps_at(sigma / norm))
    assert (ddpm.sigma(found) - sigma / norm).abs().max() < 0.003


def test_there_and_back_is_the_same_state() -> None:
    ddpm, flow = diffusion(), FlowMatching()
    timesteps = torch.tensor([101.0, 401.0, 901.0])
    states = torch.randn(3, 4, 2, 2)
    signal, noise = signal_and_noise(ddpm, timesteps)
    flow_states, _ = convert_states(states, timesteps, ddpm, flow)
    sigma = noise / (signal + noise)
    back, found = convert_states(flow_states, 1000 * sigma, flow, ddpm)
    torch.testing.assert_close(back, states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, timesteps)


def test_the_same_process_changes_nothing() -> None:
    states, timesteps = torch.randn(2, 4, 2, 2), torch.tensor([3.7, 700.1])
    for process, twin in ((diffusion(), diffusion()), (FlowMatching(), FlowMatching())):
        latents, found = convert_states(states, timesteps, process, twin)
        assert latents is states
        assert found is timesteps
    assert not same_levels(diffusion(), FlowMatching())
    assert not same_levels(FlowMatching(shift=3.0), FlowMatching(shift=1.0))


def test_tables_that_differ_are_met_at_the_nearest_level() -> None:
    linear = process_from_scheduler({"_class_name": "DDPMScheduler", "beta_schedule": "linear"})
    states, timesteps = torch.randn(2, 4, 2, 2), torch.tensor([100.0, 700.0])
    latents, found = convert_states(states, timesteps, diffusion(), linear)
    torch.testing.assert_close(latents, states)
    assert not torch.equal(found, timesteps)
    torch.testing.assert_close(linear.sigma(found), diffusion().sigma(timesteps), rtol=0, atol=3e-3)


def test_gradients_pass_and_rows_may_differ_in_level() -> None:
    states = torch.randn(2, 4, 2, 2, requires_grad=True)
    timesteps = torch.tensor([951.0, 1.0])
    latents, _ = convert_states(states, timesteps, diffusion(), FlowMatching())
    (gradient,) = torch.autograd.grad(latents.sum(), states)
    signal, noise = signal_and_noise(diffusion(), timesteps)
    torch.testing.assert_close(gradient[:, 0, 0, 0], 1 / (signal + noise))
