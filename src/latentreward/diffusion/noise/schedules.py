"""Timesteps and noise levels of diffusers' schedulers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.core.errors import InputError, check_range, first_line
from latentreward.core.storage.json_files import entry

EULER = "FlowMatchEulerDiscreteScheduler"
UNIPC = "UniPCMultistepScheduler"
FLOW_SCHEDULERS = (EULER, "FlowMatchHeunDiscreteScheduler")
"""Schedulers of a rectified flow with a fixed shift."""
_SAMPLERS = (
    "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep "
    "EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver "
    "UniPCMultistep"
)
DDPM_SCHEDULERS = tuple(f"{name}Scheduler" for name in _SAMPLERS.split())
"""Schedulers that differ only in their sampler: networks for one of them are sampled by DDIM with its config too."""
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler", "CMStochasticIterativeScheduler")
"""Schedulers of networks that were distilled to few steps, whose predictions are not those of a noise process."""
OTHER_PROCESS: Mapping[str, Any] = {"use_flow_sigmas": True, "timestep_type": "continuous"}
"""Settings by which some of :data:`DDPM_SCHEDULERS` get another noise process."""
NAME = "the scheduler config"
LEVELS = "the scheduler has no more levels"
MOST_LEVELS = 100_000
"""Largest number of noise levels of a config, whose table would fill memory; Kolors has 1100, others 1000."""


def check_scheduler(config: Mapping[str, Any], taken: Sequence[str]) -> None:
    """Refuse a scheduler, of other classes than ``taken`` or other settings, that does not tell the noise process."""
    if (found := config.get("_class_name")) is None:
        raise InputError(f"{NAME} has no _class_name; give the one saved in scheduler_config.json")
    if found not in taken:
        distilled = "are of networks distilled to few steps; give the pipeline that this one was distilled from"
        other = f"tell no noise process of this network; give a pipeline published with one of {', '.join(taken)}"
        told = distilled if found in DISTILLED else other
        raise InputError(f"the scheduler is of class {found!s:.60}, whose predictions {told}")
    for name, value in OTHER_PROCESS.items():
        if EULER not in taken and config.get(name) == value:  # Wan's UniPC has flow sigmas
            told = f"{NAME} has {name}={value}, for another noise process than DDPM's"
            raise InputError(f"{told}; give a pipeline whose network was trained without it")
    if (count := entry(config, "num_train_timesteps", int, NAME, default=1000)) > MOST_LEVELS:
        told = f"{NAME} has num_train_timesteps={count}, over {MOST_LEVELS}, whose noise levels would fill memory"
        raise InputError(f"{told}; get the pipeline as published")


def fits_kind(config: Mapping[str, Any], flow: bool) -> bool:
    """Tell whether a scheduler can be that of a rectified flow (``flow``) or of a network of DDPM; unknown ones can."""
    flows = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    return flow if flows else config.get("_class_name") not in (DDPM_SCHEDULERS if flow else FLOW_SCHEDULERS)


def make_scheduler(family: Any, config: Mapping[str, Any], num_inference_steps: int, **options: Any) -> Any:
    """Make a diffusers scheduler on the CPU, and set its timesteps, with ``options`` of its ``set_timesteps``."""
    for field in ("shift", "flow_shift"):
        entry(config, field, float, NAME, default=1.0)
    try:
        with torch.device("cpu"):
            scheduler = family.from_config({**config, "_class_name": family.__name__})
            check_range(f"[1, {len(scheduler.timesteps)}]", LEVELS, num_inference_steps=num_inference_steps)
            scheduler.set_timesteps(num_inference_steps, **options)
    except InputError:
        raise
    except (ArithmeticError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"{NAME} does not make a {family.__name__} ({first_line(error)}); get the pipeline as published"
        ) from error
    return scheduler


def check_unset(config: Mapping[str, Any], *names: str) -> None:
    """Raise InputError if the config sets an entry that a family's levels do not follow."""
    for name in names:
        if entry(config, name, bool, NAME, default=False):
            raise InputError(f"{NAME} has {name}=true, which this family's levels do not follow; set it to false there")


def check_levels(sigmas: Tensor) -> None:
    """Raise InputError if the noise levels of a flow do not fall from at most 1 to at least 0."""
    if not (sigmas[0] <= 1 and sigmas[-1] >= 0 and (sigmas.diff() < 0).all()):  # NaN too
        shown = ", ".join(f"{level:g}" for level in [*sigmas[:3].tolist(), sigmas[-1].item()])
        raise InputError(
            f"{NAME} gives the noise levels {shown}, which must fall from at most 1 to 0; set its shift and the other "
            "entries as published"
        )


def static_levels(config: Mapping[str, Any], num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Return timesteps and levels, the last one 0, of a ``FlowMatchEulerDiscreteScheduler``, as SD3's pipeline does."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_scheduler({"_class_name": EULER, **config}, FLOW_SCHEDULERS)
    check_unset(config, "use_dynamic_shifting", "invert_sigmas", "stochastic_sampling")
    scheduler = make_scheduler(FlowMatchEulerDiscreteScheduler, config, num_inference_steps)
    return _levels(scheduler)


def unipc_levels(config: Mapping[str, Any], num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Return the levels of ``UniPCMultistepScheduler`` for a flow, or those of :func:`static_levels`, by the config."""
    check_scheduler(config, (UNIPC, EULER))
    if config["_class_name"] == EULER:
        return static_levels(config, num_inference_steps)
    wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")
    for name, value in {**wanted, **dict.fromkeys(others, False)}.items():
        if (config.get(name) or False) != value:
            shown = json.dumps(config.get(name)), json.dumps(value)
            raise InputError(f"{NAME} has {name}={shown[0]}; set it to {shown[1]} there")
    from diffusers import UniPCMultistepScheduler

    scheduler = make_scheduler(UniPCMultistepScheduler, config, num_inference_steps)
    sigmas = scheduler.sigmas.to(torch.float32)
    check_levels(sigmas)
    # UniPC rounds timesteps down in float64: keep a level that is a whole number in float32 on its side.
    sigmas[:-1] -= 1e-6 * (unipc_clock(config, sigmas[:-1]) - scheduler.timesteps)
    return 1000 * sigmas[:-1], sigmas


def unipc_clock(config: Mapping[str, Any], sigma: Tensor) -> Tensor:
    """Return the numbers that a network receives for noise levels: 1000·σ, rounded down with UniPC."""
    times = 1000 * sigma
    # float32 has 0.251 · 1000 as 250.99998: a whole timestep stays one.
    return (times + 1e-4).floor() if config.get("_class_name") == UNIPC else times


def shifted_levels(
    config: Mapping[str, Any], num_inference_steps: int, mu: float | None, sigmas: Any = None
) -> tuple[Tensor, Tensor]:
    """Return the levels of a pipeline that passes noise levels to a ``FlowMatchEulerDiscreteScheduler``.

    Args:
        config: The pipeline's saved scheduler config.
        num_inference_steps: Number of steps n.
        mu: Logarithm of the shift, used with ``use_dynamic_shifting``; None for pipelines with a static shift.
        sigmas: NumPy array ``(n,)`` of the levels before the shift; None takes 1, …, 2/n, 1/n.
    """
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_scheduler(config, (EULER,))
    check_unset(config, "invert_sigmas", "stochastic_sampling", *(["use_dynamic_shifting"] if mu is None else []))
    if (count := entry(config, "num_train_timesteps", int, NAME, default=1000)) != 1000:
        raise InputError(f"{NAME} has num_train_timesteps={count}, but networks take 1000·σ; set it to 1000")
    check_range("[1, 1000]", LEVELS, num_inference_steps=num_inference_steps)
    if sigmas is None:
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    return _levels(make_scheduler(FlowMatchEulerDiscreteScheduler, config, num_inference_steps, sigmas=sigmas, mu=mu))


def _levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Return a scheduler's timesteps and checked noise levels, float32."""
    sigmas = scheduler.sigmas.to(torch.float32)
    check_levels(sigmas)
    return scheduler.timesteps.to(torch.float32), sigmas
