"""Memory, disk and time that trainings need, from estimates of ``fit --estimate``, against what a machine has."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latentreward.apps.estimate.card import GB, Card
from latentreward.apps.estimate.estimate import Estimate
from latentreward.core.errors import InputError

ALLOWANCE, CONTEXT = 1.1, GB
"""Factor for what the allocator holds beyond tensors, and bytes of a CUDA context and kernels' work space."""
IMPORTS = 2 * GB
"""Memory of a process with all its imports and data loaders."""
KEPT_ROWS = 0.5
"""Share of a rollout's rows that pass the threshold of LPO; a guess, since it depends on the reward."""
CHECKPOINTS = 3
"""Most copies of weights and optimiser state on disk at a time: best, last, and the one being written."""


@dataclass(frozen=True)
class TrainingNeeds:
    """Needs of one training."""

    memory: int  # peak memory in bytes, of the GPU or of the CPU
    weights: int  # size of all weights in bytes
    disk: int  # bytes of checkpoints
    flops: float  # operations of all steps and rollouts, or of 1,000 steps
    whole: bool = True  # whether ``flops`` are those of the whole training


def training_needs(found: Estimate, pairs: int | None = None) -> TrainingNeeds:
    """Compute the needs of a training.

    ``pairs`` is the length of an epoch where the trainer counts epochs; None if it is not known.
    """
    costs, trainer, data = found.costs, found.settings.trainer, found.settings.data.init_args
    rows, whole = (data.get("batch_size") or 1) * found.accumulated, True
    if trainer.max_steps > 0:
        steps = trainer.max_steps
    elif pairs is not None:
        steps = math.ceil(pairs / rows) * max(trainer.max_epochs or 1, 1)
    else:
        steps, whole = 1000, False
    rollouts = steps * found.accumulated  # of ReFL: the sampling of each batch
    if costs.rollout_rows:
        kept = KEPT_ROWS if "selection" in found.settings.model.init_args else 1.0
        rollouts = math.ceil(steps * rows / (costs.rollout_rows * kept))
    return TrainingNeeds(
        memory=costs.peak,
        weights=costs.weights,
        disk=CHECKPOINTS * (costs.gradients + costs.state),
        flops=float(steps * found.accumulated * (costs.forward + costs.backward) + rollouts * costs.rollout),
        whole=whole,
    )


def free_memory() -> int:
    """Return the bytes of memory that are available, or of all memory where the system does not tell."""
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needs: Mapping[str, TrainingNeeds], card: Card, remedy: str) -> str:
    """Check the memory of the GPU and of the machine; return a line that describes it.

    For a GPU that is not here nothing is compared, unless its memory is given. ``needs`` are by the trainings' names;
    ``remedy`` names settings that lower the need.
    """
    told, lacking, gpu = [], [], card.memory() if card.gpu else None
    found = "given" if card.gpu and card.card_gb else "here"
    for name, one in needs.items():
        wanted = [(IMPORTS + (one.weights if card.gpu else one.memory), free_memory(), "of memory")]
        if card.gpu:
            size = int(one.memory * ALLOWANCE) + CONTEXT
            wanted = [(size, *gpu), *([] if card.card_gb else wanted)] if gpu else []
            told += [] if gpu else [f"{name} {size / GB:.1f} GB of GPU memory"]
        for size, here, what in wanted:
            told.append(f"{name} {size / GB:.1f} of {here / GB:.1f} GB {what}")
            if size > here:
                lacking.append(f"{name} needs {size / GB:.1f} GB {what}, {here / GB:.1f} GB are {found}")
    counted = f"the peak, {ALLOWANCE - 1:.0%} more and {CONTEXT / GB:.1f} GB for CUDA" if card.gpu else "the peak"
    if lacking:
        raise InputError(f"memory: {', '.join(lacking)} (counted: {counted}); {remedy}")
    if card.gpu and not gpu:
        counted += "; no GPU is here to compare with, --card_gb 24 takes a card of 24 GB"
    elif not (card.gpu and card.card_gb):
        counted += f"{'; the weights' if card.gpu else ''} and {IMPORTS / GB:.1f} GB for the program itself"
    return f"memory: {', '.join(told)} (counted: {counted}); to lower it: {remedy}"


def told_hours(needs: Mapping[str, TrainingNeeds], card: Card) -> str:
    """Return a line that describes the time of the trainings."""
    hours = {name: one.flops / (card.tflops * 1e12) / 3600 for name, one in needs.items()}
    told = [f"{name} {one:.3g}{'' if needs[name].whole else ' per 1,000 steps'}" for name, one in hours.items()]
    return f"hours: {', '.join(told)} (computed, at --tflops {card.tflops:g}; without data, validation and pictures)"
