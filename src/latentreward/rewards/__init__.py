"""Rewards for alignment: latent reward models, pixel scorers, own functions, random controls, and mixtures."""

from latentreward.rewards.base import Reward, RewardSource
from latentreward.rewards.callable import CallableReward, RandomReward
from latentreward.rewards.http import HTTPReward
from latentreward.rewards.latent import LatentReward
from latentreward.rewards.mixture import RewardMixture
from latentreward.rewards.pixel import PixelReward

__all__ = [
    "CallableReward",
    "HTTPReward",
    "LatentReward",
    "PixelReward",
    "RandomReward",
    "Reward",
    "RewardMixture",
    "RewardSource",
]
