"""Conversion of states between noise processes, so that a reward of one process can score a policy of another."""

import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.diffusion import DDPM, FlowMatching, NoiseProcess
from latentreward.diffusion.noise.processes import per_sample


def same_levels(first: NoiseProcess, second: NoiseProcess) -> bool:
    """Tell whether two processes have the same table of timesteps and sigmas, so that states need no conversion."""
    return type(first) is type(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in ((first.timesteps, second.timesteps), (first.sigmas, second.sigmas))
    )


def describe_conversion(source: NoiseProcess, target: NoiseProcess) -> str | None:
    """Describe in one line what :func:`convert_states` does; None if the processes are the same."""
    if same_levels(source, target):
        return None
    names = type(source).__name__, type(target).__name__
    other = " of other noise levels" if names[0] == names[1] else ""
    return f"states of the policy's {names[0]} are rescaled to its {names[1]}{other}, at equal signal-to-noise ratio"


def signal_and_noise(process: NoiseProcess, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors a and s of ``x_t = a·x_0 + s·ε`` at ``timesteps`` ``(N,)``, float32.

    For flow matching the timesteps may lie between those of the process' table; for DDPM they must be in the table.

    Raises:
        InputError: If the process is neither flow matching nor DDPM.
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
    """Rescale states of ``source`` to states of ``target`` with the same signal-to-noise ratio.

    Flow matching has a + s = 1, variance-preserving diffusion a² + s² = 1. A diffusion state x becomes the
    flow-matching state ``x / (√ᾱ + √(1 − ᾱ))`` at ``σ = √(1 − ᾱ) / (√ᾱ + √(1 − ᾱ))``. A flow-matching state x becomes
    the diffusion state ``x / √((1 − σ)² + σ²)`` at ``√(1 − ᾱ) = σ / √((1 − σ)² + σ²)``. The result is the state that
    ``target`` makes of the same clean latents and noise, except that its timestep is rounded to the table of
    ``target``. States ``(N, C, ...)`` are at ``timesteps`` ``(N,)`` of ``source``.

    Returns:
        Rescaled states, with their graph, and the nearest timesteps in the table of ``target``. Both are returned
        unchanged if the processes are the same.

    Raises:
        InputError: If ``source`` is neither flow matching nor DDPM.
    """
    if same_levels(source, target):
        return latents, timesteps
    signal, noise = signal_and_noise(source, timesteps)
    norm = signal + noise if isinstance(target, FlowMatching) else (signal**2 + noise**2).sqrt()
    nearest = target.timesteps_at(noise / norm).to(timesteps.device)
    return latents / per_sample(norm, latents).to(latents.dtype), nearest
