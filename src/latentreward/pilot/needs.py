"""Memory, disk and time that the trainings of a pilot need, from estimates of ``fit --estimate``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from latentreward.errors import InputError
from latentreward.estimate.settings import Estimate
from latentreward.pilot.checks import GB, free_memory

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
    """Needs of one training.

    Attributes:
        memory: Peak memory in bytes, of the GPU or of the CPU.
        weights: Size of all weights in bytes.
        disk: Bytes of checkpoints.
        flops: Operations of all steps and rollouts.
    """

    memory: int
    weights: int
    disk: int
    flops: float


def training_needs(found: Estimate, pairs: int) -> TrainingNeeds:
    """Compute the needs of a training.

    Args:
        found: Estimate of the run.
        pairs: Number of training pairs, which is the length of an epoch where the trainer counts epochs.
    """
    costs, trainer, data = found.costs, found.settings.trainer, found.settings.data.init_args
    rows = data.batch_size * found.accumulated
    epochs = max(trainer.max_epochs or 1, 1)
    steps = trainer.max_steps if trainer.max_steps > 0 else math.ceil(pairs / rows) * epochs
    rollouts = steps * found.accumulated  # of ReFL: the sampling of each batch
    if costs.rollout_peak:
        stops = found.settings.model.init_args.sampling.num_inference_steps
        rollouts = math.ceil(steps * rows / (data.prompts_per_rollout * stops * KEPT_ROWS))
    return TrainingNeeds(
        memory=costs.peak,
        weights=costs.weights,
        disk=CHECKPOINTS * (costs.gradients + costs.state),
        flops=float(steps * found.accumulated * (costs.forward + costs.backward) + rollouts * costs.rollout),
    )


def check_gpu() -> None:
    """Raise InputError if PyTorch finds no GPU."""
    if not torch.cuda.is_available():
        raise InputError("device: PyTorch finds no GPU here; run the pilot on a machine with one of 24 GB")


REMEDY = (
    "take a machine with more, or a copy of the pilot's file with a smaller --data.batch_size and more "
    "--trainer.accumulate_grad_batches"
)
"""What to do about too little memory for a pilot."""


def check_memory(needs: Mapping[str, TrainingNeeds], gpu: bool, remedy: str = REMEDY) -> str:
    """Check the memory of the GPU or of the machine; return a line that describes it.

    Args:
        needs: Name of a training → its needs.
        gpu: Whether the trainings run on a GPU.
        remedy: What to do about too little, for the message.

    Raises:
        InputError: If it is too small.
    """
    told, lacking = [], []
    card = torch.cuda.get_device_properties(0).total_memory if gpu and torch.cuda.is_available() else 0
    for name, one in needs.items():
        host = IMPORTS + (one.weights if gpu else one.memory)
        wanted = [("of memory", host, free_memory())]
        if gpu:
            wanted.append(("of GPU memory", int(one.memory * ALLOWANCE) + CONTEXT, card))
        for what, size, here in wanted:
            told.append(f"{name} {size / GB:.1f} of {here / GB:.1f} GB {what}")
            if size > here:
                lacking.append(f"{name} needs {size / GB:.1f} GB {what}, {here / GB:.1f} GB are here")
    if lacking:
        raise InputError(f"memory: {', '.join(lacking)}; {remedy}")
    return ", ".join(told)


def check_hours(needs: Mapping[str, TrainingNeeds], tflops: float, most: float) -> str:
    """Check the time of the trainings; return a line that describes it.

    Args:
        needs: Name of a training → its needs.
        tflops: Operations per second that the device sustains, in 10¹².
        most: Hours that the trainings may take together.

    Raises:
        InputError: If they need more.
    """
    hours = {name: one.flops / (tflops * 1e12) / 3600 for name, one in needs.items()}
    if sum(hours.values()) > most:
        raise InputError(
            f"hours: the trainings need about {sum(hours.values()):.0f} hours at {tflops:g} TFLOP/s, more than "
            f"hours={most:g}; set --hours higher, --pairs lower, or --tflops to what your card sustains"
        )
    return ", ".join(f"{name} {one:.1f}" for name, one in hours.items())
