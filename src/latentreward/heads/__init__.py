"""Heads: networks that compute a score from a backbone's features."""

from latentreward.heads.base import EmbeddingHead, RewardHead
from latentreward.heads.clip_projection import CLIPProjectionHead
from latentreward.heads.drm import DRMHead
from latentreward.heads.gated_qformer import GatedQFormerHead, LogisticSquash
from latentreward.heads.layer_mix import LayerMixHead
from latentreward.heads.pavrm import PAVRMHead

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
