"""Features → a score."""

from latentreward.heads.base import EmbeddingHead, RewardHead
from latentreward.heads.clip_projection import CLIPProjectionHead
from latentreward.heads.gated_qformer import GatedQFormerHead, LogisticSquash

__all__ = ["CLIPProjectionHead", "EmbeddingHead", "GatedQFormerHead", "LogisticSquash", "RewardHead"]
