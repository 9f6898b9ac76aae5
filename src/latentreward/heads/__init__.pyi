from .base import EmbeddingHead, RewardHead
from .clip_projection import CLIPProjectionHead
from .drm import DRMHead
from .gated_qformer import GatedQFormerHead, LogisticSquash
from .layer_mix import LayerMixHead
from .pavrm import PAVRMHead

__all__ = [
    "CLIPProjectionHead",
    "DRMHead",
    "EmbeddingHead",
    "GatedQFormerHead",
    "LayerMixHead",
    "LogisticSquash",
    "PAVRMHead",
    "RewardHead",
]
