r"""Reward feedback learning: the reward of a sample, and what keeps the policy from exploiting it.

.. math:: L = \lambda\,\mathbb E\,\varphi(r) + w_{\mathrm{pre}} L_{\mathrm{pre}} + w_{\mathrm{KL}}
    \lVert f_\theta - f_{\mathrm{ref}}\rVert^2

ReFL (ImageReward, arXiv:2304.05977, algorithm 1); DRaFT (arXiv:2309.17400) maximises the reward itself. The
pre-training term is :func:`~latentreward.losses.denoising_error`, the last one :func:`prediction_drift`.
"""

import math

from torch import Tensor
from torch.nn.functional import relu

from latentreward.errors import InputError
from latentreward.losses.base import SetLoss
from latentreward.losses.diffusion_dpo import denoising_error


def prediction_drift(prediction: Tensor, reference: Tensor) -> Tensor:
    """How far the policy's output ``(N, C, ...)`` has left the reference's: ``(N,)`` float32, mean squares.

    Up to a factor that depends on the noise level alone it is the KL divergence of the two policies' steps, both
    Gaussian with the same spread.
    """
    return denoising_error(prediction, reference)


class RewardLoss(SetLoss):
    r"""Reward to loss, λ·φ(r).

    Args:
        scale: λ.
        ceiling: None: φ(r) = −r, as in DRaFT. A number c: φ(r) = max(0, c − r), as in ReFL's released code, where
            samples that score above c teach nothing; in the reward's own unit.

    Raises:
        InputError: If an argument is out of range.

    Note:
        ReFL's released code has c = 2 and λ = 1e-3, for ImageReward's scores, which have unit variance.
    """

    def __init__(self, scale: float = 1.0, ceiling: float | None = None) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"scale = {scale} must be positive and finite")
        if ceiling is not None and not math.isfinite(ceiling):
            raise InputError(f"ceiling = {ceiling} must be finite; null does without")
        self.scale, self.ceiling = scale, ceiling

    def forward(self, rewards: Tensor) -> Tensor:
        """Scalar, float32, of rewards ``(B,)``."""
        rewards = rewards.float()
        loss = -rewards if self.ceiling is None else relu(self.ceiling - rewards)
        return self.scale * loss.mean()
