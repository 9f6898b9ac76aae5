"""Choice of the noise process by a scheduler's config."""

from collections.abc import Sequence
from typing import Any

import torch

from latentreward.diffusion.noise.base import NoiseProcess
from latentreward.diffusion.noise.ddpm import DDPM
from latentreward.diffusion.noise.flow import FlowMatching
from latentreward.diffusion.noise.schedules import DDPM_SCHEDULERS, FLOW_SCHEDULERS, check_scheduler


def process_from_scheduler(
    config: dict[str, Any], taken: Sequence[str] = (*FLOW_SCHEDULERS, *DDPM_SCHEDULERS)
) -> NoiseProcess:
    """Build the noise process of a saved diffusers scheduler config: flow matching or DDPM, by its class name.

    Raises:
        InputError: If the config has no ``_class_name`` (the ``config`` of a scheduler object has none) or one that is
            not in ``taken``, or its ``prediction_type`` or ``beta_schedule`` is unknown.
    """
    check_scheduler(config, taken)
    family = FlowMatching if config["_class_name"] in FLOW_SCHEDULERS else DDPM
    with torch.device("cpu"):  # the tables stay on the CPU, whatever the default device
        return family.from_config(config)
