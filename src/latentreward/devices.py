"""Look-up of the device that a setting names."""

import torch

from latentreward.errors import InputError, first_line


def find_device(name: str | torch.device) -> torch.device:
    """Return the torch device called ``name``; ``auto`` is the accelerator, or the CPU if there is none.

    Raises:
        InputError: If this machine does not have the device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {str(name)!r}: {first_line(error)}; give one that is here, e.g. cpu") from error
