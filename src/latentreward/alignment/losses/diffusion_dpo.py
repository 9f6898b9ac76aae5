r"""Diffusion-DPO (arXiv:2311.12908): implicit rewards of images from a policy's denoising error.

.. math:: l = -\log\sigma(\hat r_w - \hat r_l), \qquad
    \hat r = -\frac{\beta}{2}\bigl(\lVert y - f_\theta(x_t, t, c)\rVert^2
    - \lVert y - f_{\mathrm{ref}}(x_t, t, c)\rVert^2\bigr)

The squared norm is a mean over elements, not a sum, and β is meant for that mean. The target y is what the network
predicts: noise, v, or the velocity of a flow. The loss is eq. 14 of the paper with βTω(λ_t) as one constant β, as in
its released code. This file computes the implicit rewards r̂; the rest is
:class:`~latentreward.reward.BradleyTerryLoss`, which also takes soft labels.
"""

from torch import Tensor


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error over elements of two ``(N, C, ...)`` tensors: ``(N,)`` float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def implicit_rewards(prediction: Tensor, reference: Tensor, target: Tensor, beta: float = 5000.0) -> Tensor:
    r"""Compute implicit rewards: β/2 times how much lower the policy's denoising error is than the reference's.

    The difference of the two errors is computed element by element, as
    :math:`(f - f_{\mathrm{ref}})(f + f_{\mathrm{ref}} - 2y)`. Subtracting two errors near 1 in float32 would leave a
    rounding error that β magnifies. At the start, where both networks agree, the reward is exactly 0.

    Args:
        prediction: ``(N, C, ...)`` the policy's output f.
        reference: ``(N, C, ...)`` the reference's output, without gradient.
        target: ``(N, C, ...)`` target y of both networks.
        beta: β; the paper's 2000 (SD1.5) and 5000 (SDXL) are for means over elements.

    Returns:
        ``(N,)`` float32.
    """
    prediction, reference, target = prediction.float(), reference.float(), target.float()
    # (f − r)(f + r − 2y) = (f − y)² − (r − y)², without the cancellation of two errors near 1.
    change = (prediction - reference) * (prediction + reference - 2 * target)
    return -0.5 * beta * change.flatten(1).mean(dim=1)
