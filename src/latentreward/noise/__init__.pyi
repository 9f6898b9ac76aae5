from .base import NoiseProcess
from .ddpm import DDPM
from .flow import ContinuousFlow, FlowMatching
from .from_scheduler import process_from_scheduler
from .levels import (
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
from .schedules import DDPM_SCHEDULERS, FLOW_SCHEDULERS, fits_kind

__all__ = [
    "DDPM",
    "DDPM_SCHEDULERS",
    "FLOW_SCHEDULERS",
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
    "fits_kind",
    "process_from_scheduler",
]
