"""How modules run: device, evaluation mode for a block, phases of a training step, and seeds of random numbers."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from json.encoder import encode_basestring_ascii  # as json.dumps writes a text, in half the time
from typing import Any

import torch
from torch import nn

from latentreward.core.errors import InputError, first_line


def find_device(name: str | torch.device) -> torch.device:
    """Return the torch device ``name``, ``auto`` for the accelerator or else the CPU; raise InputError without it."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {str(name)!r}: {first_line(error)}; give one that is here, e.g. cpu") from error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block with ``module`` in evaluation mode; afterwards restore the mode of each submodule."""
    training = [part for part in module.modules() if part.training]
    for part in training:  # not `eval`, which sets thousands of modules of a network that are in this mode already
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


PHASES = ("data_wait", "encode", "rollout", "reward", "forward", "backward", "optimizer", "ema", "log")
"""Names of the phases, in the order of tables."""
LISTENER: ContextVar[Any] = ContextVar("LISTENER", default=None)
"""The ``StepTimes`` of this thread's run; None tells nothing apart, as in threads of a server or a backward pass."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count a block to a phase of a step, see :data:`PHASES`; as a decorator, each call of a function."""
    phases = LISTENER.get()
    if phases is None or phases.pid != os.getpid():  # a worker that was forked has no part in the run's time
        yield
        return
    phases.begin(name)
    try:
        yield
    finally:
        phases.end()


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


def scoring_generator(prompt: str, seed: int, sigma: float, shape: Sequence[int]) -> torch.Generator:
    """Return a new CPU generator for the noise that is added to latents before they are scored.

    Equal arguments give equal noise, whatever other latents are in the batch: a prompt, a seed, a noise level in
    [0, 1], which is rounded to six decimals, and the shape ``(C, ...)`` of the latents of one image.
    """
    return _generator(["score", prompt, seed, f"{sigma:.6f}", list(shape), None])


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
