"""Noise levels at which a reward model scores, and the seeded noise that is added to the latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from latentreward.core.errors import InputError
from latentreward.core.seeding import scoring_generator
from latentreward.diffusion import NoiseProcess

NoiseKey = Literal["prompt", "image"]
MOST_DRAWS = 1000
"""Largest number of noisy latents of an image: a model's file could keep a machine busy without end."""


@dataclass(frozen=True)
class ScoringNoise:
    """Noise levels and seeds at which a score is computed.

    Levels are given as ``sigmas`` or as ``timesteps``. Several levels make an ensemble: the head computes one score
    from all of them (``score_ensemble``). With several seeds, the scores of the seeds are averaged. The noise is seeded
    with a hash of prompt, seed, noise level and shape of the latents. A score therefore does not depend on batch or
    order, and all images of a prompt get the same noise, as in DiNa-LRM (arXiv:2602.11146).

    Attributes:
        sigmas: Noise levels in [0, 1]; each is replaced by the nearest level of the model's noise process.
        timesteps: Timesteps of the model's noise process.
        seeds: Seeds; each gives one noise sample per level.
        noise_key: ``prompt``: images of one prompt get the same noise. ``image``: each image gets noise of its own,
            seeded also with the hash of its pixels (of its latents, if latents are scored).

    Raises:
        InputError: If neither or both of ``sigmas`` and ``timesteps`` are given, a sigma lies outside [0, 1], seeds are
            missing, repeated or not whole numbers, levels times seeds exceed :data:`MOST_DRAWS`, or ``noise_key`` is
            unknown.
    """

    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    noise_key: NoiseKey = "prompt"

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if bool(self.sigmas) == bool(self.timesteps):
            given = f"noise.sigmas={list(self.sigmas)} and noise.timesteps={list(self.timesteps)}"
            raise InputError(f"{given}: give levels as one of the two, e.g. sigmas: [0.4], or timesteps: [1]")
        outside = [sigma for sigma in self.sigmas if not 0 <= sigma <= 1]
        if outside:
            raise InputError(f"noise.sigmas holds {outside[0]}; noise levels lie in [0, 1]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"noise.seeds={list(self.seeds)}; give at least one seed, each once")
        if not all(type(seed) is int for seed in self.seeds):
            raise InputError(f"noise.seeds={list(self.seeds)}; seeds are whole numbers")
        if (draws := len(self.sigmas or self.timesteps) * len(self.seeds)) > MOST_DRAWS:
            raise InputError(f"noise: levels times seeds are {draws}; give at most {MOST_DRAWS} together")
        if self.noise_key not in get_args(NoiseKey):
            raise InputError(f"noise.noise_key is {self.noise_key!r}; give {' or '.join(get_args(NoiseKey))}")

    def __str__(self) -> str:
        """Return a short name for tables, e.g. ``sigma 0.4`` or ``t 1, 3 seeds``."""
        levels = self.sigmas or self.timesteps
        text = f"{'sigma' if self.sigmas else 't'} {'+'.join(f'{level:g}' for level in levels)}"
        if self.seeds != (0,):
            text += f", seed {self.seeds[0]}" if len(self.seeds) == 1 else f", {len(self.seeds)} seeds"
        return text if self.noise_key == "prompt" else f"{text}, noise per image"


def check_noise(noise: Any) -> None:
    """Raise InputError if ``noise`` is not a :class:`ScoringNoise`."""
    if isinstance(noise, ScoringNoise):
        return
    example = "ScoringNoise(sigmas=(0.4,))"
    if isinstance(noise, int | float):
        example = f"ScoringNoise({'sigmas' if 0 <= noise <= 1 else 'timesteps'}=({noise:g},))"
    raise InputError(f"noise is {noise!r}; give a ScoringNoise, e.g. {example}")


def timesteps_of(noise: ScoringNoise, process: NoiseProcess) -> Tensor:
    """Return the timesteps ``(K,)``, float32, of ``process`` that are nearest to the K levels of ``noise``.

    Raises:
        InputError: If a timestep lies outside the range of ``process``.
    """
    if noise.sigmas:
        return process.timesteps_at(torch.tensor(noise.sigmas, dtype=torch.float32))
    return process.snap(torch.tensor(noise.timesteps, dtype=torch.float32))


def draw_noise(
    prompts: Sequence[str], image_keys: Sequence[str] | None, seed: int, sigma: float, shape: Sequence[int]
) -> Tensor:
    """Return standard normal noise ``(B, *shape)``, float32 on the CPU, for one seed and noise level ``sigma``.

    Rows with equal prompt and image key, a hash of the image's content, get equal noise; without ``image_keys`` rows
    with equal prompts do.
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
