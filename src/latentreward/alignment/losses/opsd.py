r"""DiffusionOPSD (Apache-2.0 code: worldbench/DiffusionOPSD): targets found by climbing a reward from a prediction.

With y₀ the clean latents that the older policy predicts for a state, radius δ = ρ‖y₀‖, and n steps in each direction,

.. math::
    y^\pm \leftarrow y^\pm \pm \frac{\eta\,\delta}{n}\,\frac{\nabla R(y^\pm)}{\lVert\nabla R(y^\pm)\rVert},
    \qquad y^\pm \leftarrow y_0 + (y^\pm - y_0)\,\min\bigl(1, \delta / \lVert y^\pm - y_0\rVert\bigr).

The loss is DiffusionNFT's with a target for each branch (:class:`~latentreward.alignment.NFTLoss`), without its 1/β.
After one step the two targets are mirror images, and the loss does not depend on the optimality r.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentreward.alignment.losses.ram import directed_target
from latentreward.reward.losses.base import per_row


def reward_ascent(
    anchor: Tensor, slope_of: Callable[[Tensor], Tensor], radius: Tensor, steps: int = 2, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Move predicted clean latents up and down a reward, by at most a radius, without gradient.

    Args:
        anchor: ``(B, C, ...)`` y₀.
        slope_of: Function of latents ``(B, C, ...)``, called 2n − 1 times: the gradient of each row's reward.
        radius: ``(B,)`` δ, positive.
        steps: n, at least 1.
        rate: η, positive; 1 reaches the radius along a straight line.

    Returns:
        y⁺ and y⁻, each ``(B, C, ...)``.
    """
    first, ends = slope_of(anchor), []
    for sign in (1.0, -1.0):
        end = anchor
        for number in range(steps):
            slope = slope_of(end) if number else first
            direction = slope / per_row(_length(slope) + 1e-12, slope)
            away = directed_target(end, direction, sign * rate / steps * radius) - anchor
            end = directed_target(anchor, away, (radius / _length(away).clamp(min=1e-12)).clamp(max=1))
        ends.append(end)
    return ends[0], ends[1]


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)
