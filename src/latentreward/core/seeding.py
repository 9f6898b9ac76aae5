"""Random generators seeded by the name of the item that the numbers are for.

The numbers do not depend on rank, batch, worker process or the state of a global generator.
"""

import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from json.encoder import encode_basestring_ascii  # as json.dumps writes a text, in half the time
from typing import Any

import torch


def pair_generator(seed: int, purpose: str, epoch: int, pair_id: str, image_key: str | None = None) -> torch.Generator:
    """Return a new CPU generator for the random numbers of one purpose and one pair.

    Args:
        seed: Seed of the run.
        purpose: Use of the numbers, e.g. ``"noise"``, ``"timestep"``, ``"posterior"``, ``"side"``; numbers of different
            purposes are independent.
        epoch: Epoch number; a constant for numbers that must not change between epochs.
        pair_id: Name of the pair; empty for numbers that belong to no pair, such as the order of an epoch.
        image_key: Name of one image, for numbers that all pairs with this image share, or that differ between the two
            images of a pair.

    Returns:
        A generator on the CPU. Equal arguments give equal numbers on every machine with the same torch version.

    Note:
        The seed has 63 bits, but torch's CPU generator uses only the low 32. Among n pairs about n² / 2³³ couples get
        the same numbers by chance (about 40 couples in 600,000 pairs).
    """
    return _generator([seed, purpose, epoch, pair_id, image_key])


def scoring_generator(
    prompt: str, seed: int, sigma: float, shape: Sequence[int], image_key: str | None = None
) -> torch.Generator:
    """Return a new CPU generator for the noise that is added to latents before they are scored.

    Equal arguments give equal noise, whatever other latents are in the batch.

    Args:
        prompt: Prompt of the latents; without ``image_key`` all images of a prompt get the same noise.
        seed: Seed of the noise.
        sigma: Noise level in [0, 1], rounded to six decimals.
        shape: Shape ``(C, ...)`` of the latents of one image.
        image_key: Hash of the image's content, to give each image noise of its own.
    """
    return _generator(["score", prompt, seed, f"{sigma:.6f}", list(shape), image_key])


def _generator(name: list[Any]) -> torch.Generator:
    return torch.Generator().manual_seed(_seed_of(json.dumps(name)))


def _seed_of(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def coin_flips(seed: int, purpose: str, epoch: int, pair_ids: Sequence[str]) -> list[bool]:
    """Draw ``torch.randint(2, ())`` from the :func:`pair_generator` of each pair; a million pairs take 4 s."""
    start = json.dumps([seed, purpose, epoch])[:-1]
    seeds = (_seed_of(f"{start}, {encode_basestring_ascii(pair_id)}, null]") for pair_id in pair_ids)
    generator, drawn = torch.Generator(), torch.empty((), dtype=torch.int64)  # new ones would take twice the time
    return [drawn.random_(2, generator=generator.manual_seed(one)).item() == 1 for one in seeds]


def run_seed(seed: int | None) -> int:
    """Return ``seed``; if it is None, the run's seed that ``seed_everything`` put into the environment, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
