"""Latents → noisy latents."""

import torch

from latentreward.errors import InputError
from latentreward.noise.base import NoiseProcess
from latentreward.noise.ddpm import DDPM
from latentreward.noise.flow import FlowMatching
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
    """The noise process that a saved diffusers scheduler config describes: flow matching by its class name, else DDPM.

    Raises:
        InputError: If the config names no class, as a live scheduler's ``config`` does not, or the class predicts what
            no known process does.
    """
    if "_class_name" not in config:
        raise InputError("the scheduler config has no _class_name; give the one saved in scheduler_config.json")
    family = FlowMatching if "FlowMatch" in config["_class_name"] else DDPM
    with torch.device("cpu"):  # whatever the default device: the tables are looked up on the CPU
        return family.from_config(config)
