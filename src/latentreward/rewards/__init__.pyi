from .base import Reward, RewardSource
from .callable import CallableReward, RandomReward
from .http import HTTPReward
from .latent import LatentReward
from .mixture import RewardMixture
from .pixel import PixelReward
from .unchanged import UnchangedRegion

__all__ = [
    "CallableReward",
    "HTTPReward",
    "LatentReward",
    "PixelReward",
    "RandomReward",
    "Reward",
    "RewardMixture",
    "RewardSource",
    "UnchangedRegion",
]
