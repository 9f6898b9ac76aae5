from .heads.base import EmbeddingHead, RewardHead
from .heads.clip_projection import CLIPProjectionHead
from .heads.gated_qformer import GatedQFormerHead, LogisticSquash
from .heads.pooled import DRMHead, LayerMixHead, PAVRMHead
from .losses.base import (
    BradleyTerryLoss,
    ConstantVarianceThurstoneLoss,
    PreferenceLoss,
    ThurstoneLoss,
    bhattacharyya_fidelity,
    bradley_terry_nll,
    comparison_std,
    gather_pair_scores,
    gather_with_grad,
    log_ndtr,
    mixture_fidelity,
    thurstone_nll,
    weighted_mean,
)
from .losses.lrm import LRMLoss, lrm_batch_loss, lrm_pair_loss
from .losses.targets import (
    LabelLoss,
    RankingDistillation,
    RegressionDistillation,
    TargetLoss,
    TieLoss,
    gaussian_nll,
    teacher_preference,
)
from .metrics.calibration import PairCalibration
from .metrics.pairwise import GroupPairAccuracy, MeanLoss, MeanMargin, PairwiseAccuracy
from .modules.reward import DiNaLRMModule, LRMModule, RewardModule, ScoredPairs
from .modules.training import WarmupSchedule
from .remote.client import RemoteError, RemoteServer
from .remote.schemas import PlainJSON, ServedImages
from .scorers.base import ImageScorer, Scorer, TableScorer
from .scorers.clip import AestheticScorer, CLIPScorer, PickScorer
from .scorers.hpsv2 import HPSv2Scorer
from .scorers.plugins import CallableScorer, HTTPScorer, TableColumn
from .scorers.reward_model import RewardModelScorer
from .scorers.step_aware import StepAwareScorer
from .scoring.ensemble import edit_prompt
from .scoring.files import PublishedSettings
from .scoring.find import ModelSource
from .scoring.publishing import Card
from .scoring.reward_model import RewardModel, normalise_score
from .scoring.scoring_noise import Calibration, ScoringNoise

__all__ = [
    "AestheticScorer",
    "BradleyTerryLoss",
    "CLIPProjectionHead",
    "CLIPScorer",
    "Calibration",
    "CallableScorer",
    "Card",
    "ConstantVarianceThurstoneLoss",
    "DRMHead",
    "DiNaLRMModule",
    "EmbeddingHead",
    "GatedQFormerHead",
    "GroupPairAccuracy",
    "HPSv2Scorer",
    "HTTPScorer",
    "ImageScorer",
    "LRMLoss",
    "LRMModule",
    "LabelLoss",
    "LayerMixHead",
    "LogisticSquash",
    "MeanLoss",
    "MeanMargin",
    "ModelSource",
    "PAVRMHead",
    "PairCalibration",
    "PairwiseAccuracy",
    "PickScorer",
    "PlainJSON",
    "PreferenceLoss",
    "PublishedSettings",
    "RankingDistillation",
    "RegressionDistillation",
    "RemoteError",
    "RemoteServer",
    "RewardHead",
    "RewardModel",
    "RewardModelScorer",
    "RewardModule",
    "ScoredPairs",
    "Scorer",
    "ScoringNoise",
    "ServedImages",
    "StepAwareScorer",
    "TableColumn",
    "TableScorer",
    "TargetLoss",
    "ThurstoneLoss",
    "TieLoss",
    "WarmupSchedule",
    "bhattacharyya_fidelity",
    "bradley_terry_nll",
    "comparison_std",
    "edit_prompt",
    "gather_pair_scores",
    "gather_with_grad",
    "gaussian_nll",
    "log_ndtr",
    "lrm_batch_loss",
    "lrm_pair_loss",
    "mixture_fidelity",
    "normalise_score",
    "teacher_preference",
    "thurstone_nll",
    "weighted_mean",
]
