"""LRM (arXiv:2502.01051): the reward module with its defaults."""

from collections.abc import Callable, Sequence
from typing import Any

from latentreward.core.contracts import FeatureSpec
from latentreward.diffusion import DiffusionBackbone, LevelSampler, TimestepGrid
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.heads.clip_projection import CLIPProjectionHead
from latentreward.reward.losses.base import PreferenceLoss
from latentreward.reward.losses.lrm import LRMLoss
from latentreward.reward.modules.reward import RewardModule


class LRMModule(RewardModule):
    """Reward module with LRM's training: one timestep per pair of {1, 51, …, 951}, different noise for its images.

    Args:
        backbone: Any backbone; a U-Net in the paper.
        loss: None takes ``LRMLoss(mode="pair")``.
        levels: Sampler of timesteps; None takes LRM's grid.
        options: See :class:`RewardModule`.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead] = CLIPProjectionHead,
        loss: PreferenceLoss | None = None,
        levels: LevelSampler | None = None,
        noise_per_image: bool = True,
        eval_timesteps: Sequence[float] = (1, 251, 501, 801),
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            head,
            loss or LRMLoss(),
            levels or TimestepGrid(),
            noise_per_image=noise_per_image,
            eval_timesteps=eval_timesteps,
            **options,
        )
