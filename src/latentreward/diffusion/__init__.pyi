from .backbones.base import DiffusionBackbone, TransformerBackbone, check_taps
from .backbones.tuning import LoRA
from .cache.datamodule import CachedPreferenceDataModule, CachedSplit
from .families.backbone import FamilyBackbone, load_family_backbone
from .families.base import Family, PipelineConfigs, find_family, import_family, is_foreign
from .families.flow import FlowFamily
from .families.sd import SDUNetBackbone
from .families.sd3 import SD3DiTBackbone
from .noise.processes import (
    DDPM,
    BetaSigma,
    ConstantSigma,
    ContinuousFlow,
    FlowMatching,
    LevelSampler,
    LogitNormalSigma,
    ModeSigma,
    NoiseProcess,
    PowerSigma,
    TargetSigma,
    TimestepGrid,
    UniformSigma,
    process_from_scheduler,
)
from .noise.schedules import DDPM_SCHEDULERS, FLOW_SCHEDULERS, fits_kind

__all__ = [
    "DDPM",
    "DDPM_SCHEDULERS",
    "FLOW_SCHEDULERS",
    "BetaSigma",
    "CachedPreferenceDataModule",
    "CachedSplit",
    "ConstantSigma",
    "ContinuousFlow",
    "DiffusionBackbone",
    "Family",
    "FamilyBackbone",
    "FlowFamily",
    "FlowMatching",
    "LevelSampler",
    "LoRA",
    "LogitNormalSigma",
    "ModeSigma",
    "NoiseProcess",
    "PipelineConfigs",
    "PowerSigma",
    "SD3DiTBackbone",
    "SDUNetBackbone",
    "TargetSigma",
    "TimestepGrid",
    "TransformerBackbone",
    "UniformSigma",
    "check_taps",
    "find_family",
    "fits_kind",
    "import_family",
    "is_foreign",
    "load_family_backbone",
    "process_from_scheduler",
]
