"""LRM (arXiv:2502.01051) and DiNa-LRM (arXiv:2602.11146): the reward module with their defaults."""

from collections.abc import Callable, Sequence
from typing import Any

from latentreward.core.contracts import FeatureSpec
from latentreward.diffusion import DiffusionBackbone, LevelSampler, TimestepGrid, UniformSigma
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.heads.clip_projection import CLIPProjectionHead
from latentreward.reward.heads.gated_qformer import GatedQFormerHead
from latentreward.reward.losses.base import PreferenceLoss, ThurstoneLoss
from latentreward.reward.losses.lrm import LRMLoss
from latentreward.reward.modules.reward import RewardModule


class LRMModule(RewardModule):
    """Reward module with LRM's training: one timestep per pair of {1, 51, …, 951}, different noise for its images.

    Args:
        backbone: Any backbone; a U-Net in the paper.
        head: See :class:`RewardModule`.
        loss: None takes ``LRMLoss(mode="pair")``.
        levels: Sampler of timesteps; None takes LRM's grid.
        noise_per_image: See :class:`~latentreward.reward.modules.reward.PairModule`.
        eval_timesteps: See :class:`~latentreward.reward.modules.reward.PairModule`.
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


class DiNaLRMModule(RewardModule):
    """Reward module with DiNa-LRM's training: a uniform noise level per pair, and the same noise for its images.

    The step is :meth:`PairModule.training_step <latentreward.reward.modules.reward.PairModule.training_step>`, and
    ``RewardModule.encode`` and ``score`` do its work. PairModule's defaults give both images of a pair one noise and
    one level. Evaluation also uses the head's ensemble over several noise levels.

    Args:
        backbone: Any backbone; a DiT in the paper.
        head: See :class:`RewardModule`.
        loss: None takes the paper's ``ThurstoneLoss()``.
        levels: Sampler of noise levels; None takes uniform noise levels.
        eval_sigmas: See :class:`~latentreward.reward.modules.reward.PairModule`.
        ensemble_sigmas: See :class:`RewardModule`.
        options: See :class:`RewardModule`.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: Callable[[FeatureSpec], RewardHead] = GatedQFormerHead,
        loss: PreferenceLoss | None = None,
        levels: LevelSampler | None = None,
        eval_sigmas: Sequence[float] = (0.2, 0.5, 0.8),
        ensemble_sigmas: Sequence[float] = (0.2, 0.5, 0.7),
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            head,
            loss or ThurstoneLoss(),
            levels or UniformSigma(),
            eval_sigmas=eval_sigmas,
            ensemble_sigmas=ensemble_sigmas,
            **options,
        )
