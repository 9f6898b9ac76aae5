"""The noise levels at which a model scores, and the noise drawn for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from latentreward.errors import InputError
from latentreward.noise import NoiseProcess
from latentreward.seeding import scoring_generator

NoiseKey = Literal["prompt", "image"]


@dataclass(frozen=True)
class ScoringNoise:
    """Noise levels and draws behind one score.

    Levels are noise levels or timesteps, not both; several make an ensemble (the head's ``score_ensemble``). Several
    seeds are averaged. The draw is seeded by blake2b(prompt, seed, noise level, shape of the latents), so that a score
    depends on neither batch nor order, and all images of a prompt share it (DiNa-LRM compares them under the same
    noise, arXiv:2602.11146).

    Attributes:
        sigmas: Noise levels in [0, 1]; the nearest of the model's noise process are used.
        timesteps: Timesteps of the model's noise process.
        seeds: One draw each; the mean of their scores counts.
        noise_key: ``prompt``: images of one prompt share the draw. ``image``: each image has one of its own, by the
            hash of its pixels.

    Raises:
        InputError: If there is no level, there are both kinds, one is out of range, or there is no seed.
    """

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    noise_key: NoiseKey = "prompt"

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.sigmas) == bool(self.timesteps):
            raise InputError(
                f"noise.sigmas={list(self.sigmas)} and noise.timesteps={list(self.timesteps)}: give levels as one of "
                "the two, e.g. sigmas: [0.4], or timesteps: [1]"
            )
        outside = [sigma for sigma in self.sigmas if not 0 <= sigma <= 1]
        if outside:
            raise InputError(f"noise.sigmas holds {outside[0]}; noise levels lie in [0, 1]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"noise.seeds={list(self.seeds)}; give at least one seed, each once")

    def __str__(self) -> str:
        """Short name for tables: ``sigma 0.4``, ``t 1, 3 seeds``."""
        levels = self.sigmas or self.timesteps
        text = f"{'sigma' if self.sigmas else 't'} {'+'.join(f'{level:g}' for level in levels)}"
        if self.seeds != (0,):
            text += f", seed {self.seeds[0]}" if len(self.seeds) == 1 else f", {len(self.seeds)} seeds"
        return text if self.noise_key == "prompt" else f"{text}, noise per image"


def check_noise(noise: Any) -> None:
    """Raise InputError for what is not a :class:`ScoringNoise`."""
    if isinstance(noise, ScoringNoise):
        return
    example = "ScoringNoise(sigmas=(0.4,))"
    if isinstance(noise, int | float):
        example = f"ScoringNoise({'sigmas' if 0 <= noise <= 1 else 'timesteps'}=({noise:g},))"
    raise InputError(f"noise is {noise!r}; give a ScoringNoise, e.g. {example}")


def timesteps_of(noise: ScoringNoise, process: NoiseProcess) -> Tensor:
    """Timesteps ``(K,)`` float32 of the table of ``process`` nearest to the levels of ``noise``.

    Raises:
        InputError: If a timestep lies outside the process.
    """
    if noise.sigmas:
        return process.timesteps_at(torch.tensor(noise.sigmas, dtype=torch.float32))
    return process.snap(torch.tensor(noise.timesteps, dtype=torch.float32))


def draw_noise(
    prompts: Sequence[str], image_keys: Sequence[str] | None, seed: int, sigma: float, shape: Sequence[int]
) -> Tensor:
    """Standard normal numbers ``(B, *shape)``, float32 on the CPU, for one level; equal prompts get equal ones.

    Args:
        prompts: B prompts.
        image_keys: Names of the images' contents, if each is to have noise of its own.
        seed: Number of the draw.
        sigma: Noise level.
        shape: Shape ``(C, ...)`` of the latents of one image.
    """
    keys = [None] * len(prompts) if image_keys is None else image_keys
    names = list(zip(prompts, keys, strict=True))
    drawn = {
        (prompt, key): torch.randn(
            *shape, generator=scoring_generator(prompt, seed, sigma, shape, key), device="cpu", dtype=torch.float32
        )
        for prompt, key in dict.fromkeys(names)
    }
    return torch.stack([drawn[name] for name in names])
