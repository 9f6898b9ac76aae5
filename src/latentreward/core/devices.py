"""How modules run: the device that a setting names, its widest floats, and evaluation mode for a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for Apple's devices, which have no wider type."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_float64(values: Tensor) -> Tensor:
    """Return ``values`` in float64, on the CPU if their device has no such type."""
    return (values if widest_float(values.device) == torch.float64 else values.cpu()).double()


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
