"""Room 3: latents → noisy latents."""

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
    """The noise process that a diffusers scheduler config describes: flow matching by its class name, else DDPM."""
    family = FlowMatching if "FlowMatch" in config.get("_class_name", "") else DDPM
    return family.from_config(config)
