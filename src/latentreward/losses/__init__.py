"""Preference losses: scores of pairs in, one number out."""

from latentreward.losses.base import PreferenceLoss, weighted_mean
from latentreward.losses.bradley_terry import BradleyTerryLoss, bradley_terry_nll
from latentreward.losses.gather import gather_pair_scores, gather_with_grad
from latentreward.losses.lrm import LRMLoss, lrm_batch_loss, lrm_pair_loss
from latentreward.losses.thurstone import (
    ConstantVarianceThurstoneLoss,
    ThurstoneLoss,
    bhattacharyya_fidelity,
    comparison_std,
    log_ndtr,
    mixture_fidelity,
    thurstone_log_probability,
    thurstone_nll,
)

__all__ = [
    "BradleyTerryLoss",
    "ConstantVarianceThurstoneLoss",
    "LRMLoss",
    "PreferenceLoss",
    "ThurstoneLoss",
    "bhattacharyya_fidelity",
    "bradley_terry_nll",
    "comparison_std",
    "gather_pair_scores",
    "gather_with_grad",
    "log_ndtr",
    "lrm_batch_loss",
    "lrm_pair_loss",
    "mixture_fidelity",
    "thurstone_log_probability",
    "thurstone_nll",
    "weighted_mean",
]
