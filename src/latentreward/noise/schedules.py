"""Timesteps and noise levels of diffusers' schedulers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.errors import InputError


def make_scheduler(family: Any, config: Mapping[str, Any], num_inference_steps: int) -> Any:
    """Make a diffusers scheduler on the CPU, and set its timesteps.

    Args:
        family: Class of the scheduler.
        config: The pipeline's saved scheduler config, of this class or a related one.
        num_inference_steps: Number of steps.

    Raises:
        InputError: If the scheduler cannot make ``num_inference_steps`` steps.
    """
    with torch.device("cpu"):
        scheduler = family.from_config({**config, "_class_name": family.__name__})
        levels = len(scheduler.timesteps)
        if not 1 <= num_inference_steps <= levels:
            raise InputError(
                f"num_inference_steps={num_inference_steps} must lie in 1..{levels}, the scheduler's levels"
            )
        scheduler.set_timesteps(num_inference_steps)
    return scheduler


def static_levels(config: Mapping[str, Any], num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Return the levels that a ``FlowMatchEulerDiscreteScheduler`` makes by itself, as SD3's pipeline asks for them.

    Args:
        config: The pipeline's saved scheduler config.
        num_inference_steps: Number of steps n.

    Returns:
        Timesteps ``(n,)`` and noise levels ``(n + 1,)``, the last one 0; float32.

    Raises:
        InputError: If the scheduler cannot make ``num_inference_steps`` steps, or its config has
            ``use_dynamic_shifting`` (timesteps depend on the image size) or ``invert_sigmas``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(name):
            raise InputError(
                f"the scheduler config has {name}=true, which this family's levels do not follow; set it to false "
                "there, and shift to the one to sample with"
            )
    scheduler = make_scheduler(FlowMatchEulerDiscreteScheduler, config, num_inference_steps)
    return scheduler.timesteps.to(torch.float32), scheduler.sigmas.to(torch.float32)


def shifted_levels(config: Mapping[str, Any], num_inference_steps: int, mu: float | None) -> tuple[Tensor, Tensor]:
    """Return the levels of a pipeline that passes 1, …, 2/n, 1/n to a ``FlowMatchEulerDiscreteScheduler``.

    Args:
        config: The pipeline's saved scheduler config.
        num_inference_steps: Number of steps n.
        mu: Logarithm of the shift, which counts under ``use_dynamic_shifting``; None for pipelines with a static one.

    Returns:
        Timesteps ``(n,)``, 1000·σ, and noise levels ``(n + 1,)``, the last one 0; float32.

    Raises:
        InputError: If the number of steps is out of range, or the config has ``invert_sigmas``, or
            ``use_dynamic_shifting`` without ``mu``.
    """
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config.get("invert_sigmas"):
        raise InputError("the scheduler config has invert_sigmas=true, which is not supported; set it to false")
    if config.get("use_dynamic_shifting") and mu is None:
        raise InputError(
            "the scheduler config has use_dynamic_shifting=true, but pipelines of this family have a static shift; set "
            "it to false, and shift to the one to sample with"
        )
    if not 1 <= num_inference_steps <= 1000:
        raise InputError(f"num_inference_steps={num_inference_steps} must lie in 1..1000, the scheduler's levels")
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            {**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.timesteps.to(torch.float32), scheduler.sigmas.to(torch.float32)
