"""Noise processes (latents to noisy latents) and samplers of noise levels."""

import torch

from latentreward.errors import InputError
from latentreward.noise.base import NoiseProcess
from latentreward.noise.ddpm import DDPM
from latentreward.noise.flow import ContinuousFlow, FlowMatching
from latentreward.noise.levels import (
    BetaSigma,
    ConstantSigma,
    LevelSampler,
    LogitNormalSigma,
    ModeSigma,
    PowerSigma,
    TargetSigma,
    TimestepGrid,
    UniformSigma,
)

__all__ = [
    "DDPM",
    "BetaSigma",
    "ConstantSigma",
    "ContinuousFlow",
    "FlowMatching",
    "LevelSampler",
    "LogitNormalSigma",
    "ModeSigma",
    "NoiseProcess",
    "PowerSigma",
    "TargetSigma",
    "TimestepGrid",
    "UniformSigma",
    "process_from_scheduler",
]


def process_from_scheduler(config: dict) -> NoiseProcess:
    """Build the noise process of a saved diffusers scheduler config: flow matching by its class name, else DDPM.

    Raises:
        InputError: If the config has no ``_class_name`` (the ``config`` of a scheduler object has none), or its
            ``prediction_type`` is unknown.
    """
    if "_class_name" not in config:
        raise InputError("the scheduler config has no _class_name; give the one saved in scheduler_config.json")
    family = FlowMatching if "FlowMatch" in config["_class_name"] else DDPM
    with torch.device("cpu"):  # the tables stay on the CPU, whatever the default device
        return family.from_config(config)
