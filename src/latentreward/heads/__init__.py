"""Heads: networks that compute a score from a backbone's features."""

from latentreward.heads.base import EmbeddingHead, RewardHead
from latentreward.heads.clip_projection import CLIPProjectionHead
from latentreward.heads.gated_qformer import GatedQFormerHead, LogisticSquash

__all__ = ["CLIPProjectionHead", "EmbeddingHead", "GatedQFormerHead", "LogisticSquash", "RewardHead"]
