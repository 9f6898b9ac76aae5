r"""Reward feedback learning: loss on a sample's reward, and drift from the reference as a regulariser.

.. math:: L = \lambda\,\mathbb E\,\varphi(r) + w_{\mathrm{pre}} L_{\mathrm{pre}} + w_{\mathrm{KL}}
    \lVert f_\theta - f_{\mathrm{ref}}\rVert^2

The loss is that of ReFL (ImageReward, arXiv:2304.05977, algorithm 1); DRaFT (arXiv:2309.17400) maximises the reward
itself, PRFL (arXiv:2511.21541) its logistic function. The first term is :class:`RewardLoss`, the second
:func:`~latentreward.alignment.denoising_error`, the third the same of policy and reference: up to a factor that depends
only on the noise level, the KL divergence between their steps, two Gaussians of equal spread.
"""

import math

from torch import Tensor
from torch.nn.functional import relu

from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import detached, returns, wrong_tensor
from latentreward.reward.losses.base import SetLoss


class RewardLoss(SetLoss):
    r"""Loss of a reward r, λ·φ(r).

    Args:
        scale: λ, positive.
        ceiling: None gives φ(r) = −r, as in DRaFT. A number c, in reward units, gives φ(r) = max(0, c − r), as in
            ReFL's released code: samples that score above c then have no gradient.
        sigmoid: Whether to replace r by its logistic function σ(r) in (0, 1); ``ceiling`` is then compared with σ(r).

    Raises:
        InputError: If an argument is out of range.

    Note:
        ReFL's released code has c = 2 and λ = 1e-3, for ImageReward's scores, which have unit variance. PRFL's released
        code has ``sigmoid``, c = 2 and λ = 0.1. There the ceiling is never reached, because σ(r) is below 1: the loss
        always is λ·(2 − σ(r)), and its gradient, −λ·σ(r)·(1 − σ(r)), fades for high and for low rewards.
    """

    def __init__(self, scale: float = 1.0, ceiling: float | None = None, sigmoid: bool = False) -> None:
        super().__init__()
        check_range("(0, inf)", scale=scale)
        if ceiling is not None and not math.isfinite(ceiling):
            raise InputError(f"ceiling = {ceiling} must be finite; null sets no ceiling")
        self.scale, self.ceiling, self.sigmoid = scale, ceiling, sigmoid

    @returns(lambda found, loss, rewards: wrong_tensor(found, ()) or detached(found, rewards))
    def forward(self, rewards: Tensor) -> Tensor:
        """Compute the mean loss of rewards ``(B,)``: a scalar, float32."""
        rewards = rewards.float().sigmoid() if self.sigmoid else rewards.float()
        loss = -rewards if self.ceiling is None else relu(self.ceiling - rewards)
        return self.scale * loss.mean()
