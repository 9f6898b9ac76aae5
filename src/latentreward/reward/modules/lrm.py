"""LRM (arXiv:2502.01051): the reward module with LRM's defaults."""

from collections.abc import Callable, Sequence
from typing import Any

from latentreward.backbones.base import DiffusionBackbone
from latentreward.contracts import FeatureSpec
from latentreward.heads import CLIPProjectionHead, RewardHead
from latentreward.losses import LRMLoss, PreferenceLoss
from latentreward.modules.reward import RewardModule
from latentreward.noise import LevelSampler, TimestepGrid


class LRMModule(RewardModule):
    """Reward module with LRM's training: one timestep per pair of {1, 51, …, 951}, different noise for its images.

    Args:
        backbone: Any backbone; a U-Net in the paper.
        head: See :class:`RewardModule`.
        loss: None takes ``LRMLoss(mode="pair")``.
        levels: Sampler of timesteps; None takes LRM's grid.
        noise_per_image: See :class:`~latentreward.modules.pairs.PairModule`.
        eval_timesteps: See :class:`~latentreward.modules.pairs.PairModule`.
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
