"""States of one noise process as states of another over the same latents, so that a reward may score a policy's."""

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise import DDPM, FlowMatching, NoiseProcess
from latentreward.noise.base import per_sample


def same_levels(first: NoiseProcess, second: NoiseProcess) -> bool:
    """Whether two processes have one table, so that a timestep means the same in both."""
    return type(first) is type(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in ((first.timesteps, second.timesteps), (first.sigmas, second.sigmas))
    )


def describe_conversion(source: NoiseProcess, target: NoiseProcess) -> str | None:
    """Say in one line what :func:`convert_states` does; None if the processes are the same."""
    if same_levels(source, target):
        return None
    names = type(source).__name__, type(target).__name__
    other = " of other noise levels" if names[0] == names[1] else ""
    return f"states of the policy's {names[0]} are rescaled to its {names[1]}{other}, at equal signal-to-noise ratio"


def signal_and_noise(process: NoiseProcess, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a and s of ``x_t = a·x_0 + s·ε`` at ``timesteps`` ``(N,)``, float32.

    Flow matching has a level between any two of its table; DDPM has those of its table alone.

    Raises:
        InputError: If the process is neither.
    """
    if isinstance(process, FlowMatching):
        sigma = timesteps.float() * (process.sigmas[0] / process.timesteps[0]).item()
        return 1.0 - sigma, sigma
    if isinstance(process, DDPM):
        sigma = process.sigma(timesteps)
        return (1.0 - sigma**2).sqrt(), sigma
    raise InputError(f"states of a {type(process).__name__} cannot be converted; use a reward of the policy's process")


def convert_states(
    latents: Tensor, timesteps: Tensor, source: NoiseProcess, target: NoiseProcess
) -> tuple[Tensor, Tensor]:
    """States of ``source`` rescaled to states of ``target`` with the same ratio of signal to noise.

    Flow matching has a + s = 1, variance-preserving diffusion a² + s² = 1. So a state goes to flow matching as
    ``x / (√ᾱ + √(1 − ᾱ))`` at ``σ = √(1 − ᾱ) / (√ᾱ + √(1 − ᾱ))``, and to diffusion as ``x / √((1 − σ)² + σ²)`` at
    ``√(1 − ᾱ) = σ / √((1 − σ)² + σ²)``: exactly what the other process would have made of the same latents and noise.

    Args:
        latents: ``(N, C, ...)``.
        timesteps: ``(N,)`` of ``source``.
        source: Process that the states belong to.
        target: Process that they shall belong to.

    Returns:
        Latents, with their graph, and the nearest timesteps in ``target``'s table; both unchanged if the processes are
        the same.
    """
    if same_levels(source, target):
        return latents, timesteps
    signal, noise = signal_and_noise(source, timesteps)
    norm = signal + noise if isinstance(target, FlowMatching) else (signal**2 + noise**2).sqrt()
    nearest = target.timesteps_at(noise / norm).to(timesteps.device)
    return latents / per_sample(norm, latents).to(latents.dtype), nearest
