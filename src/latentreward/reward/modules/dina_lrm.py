"""DiNa-LRM (arXiv:2602.11146): the reward module with its defaults."""

from collections.abc import Callable, Sequence
from typing import Any

from latentreward.core.contracts import FeatureSpec
from latentreward.diffusion import DiffusionBackbone, LevelSampler, UniformSigma
from latentreward.reward.heads.base import RewardHead
from latentreward.reward.heads.gated_qformer import GatedQFormerHead
from latentreward.reward.losses.base import PreferenceLoss, ThurstoneLoss
from latentreward.reward.modules.reward import RewardModule


class DiNaLRMModule(RewardModule):
    """Reward module with DiNa-LRM's training: a uniform noise level per pair, and the same noise for its images.

    The step is :meth:`RewardModule.training_step <latentreward.reward.modules.reward.RewardModule.training_step>`; its
    defaults give both images of a pair one noise and one level. Evaluation also uses the head's ensemble over several
    noise levels.

    Args:
        backbone: Any backbone; a DiT in the paper.
        loss: None takes the paper's ``ThurstoneLoss()``.
        levels: Sampler of noise levels; None takes uniform noise levels.
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
