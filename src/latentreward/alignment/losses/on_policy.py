r"""On-policy distillation: a policy's outputs at states of its own samples are pulled to those of frozen teachers.

.. math:: l = f(\sigma)\,\frac1J \sum_j \langle (v - v_j)^2 \rangle

v is the output of the policy and v_j that of teacher j for one noisy state. The mean μ of a sampler's step is linear in
the output, with the slope c: a flow's is Δ(1 + s²(1 − σ) / 2σ), where Δ is the step in σ and s√Δ the standard deviation
of its noise. So losses of means differ from one of outputs by a factor of the noise level alone.
"""

from typing import Literal

import torch
from torch import Tensor

from latentreward.alignment.losses.matching import squared_error
from latentreward.core.errors import check_choices
from latentreward.reward.losses.base import SetLoss

Factor = Literal["velocity", "mean_match", "kl_exact"]


class OnPolicyLoss(SetLoss):
    """Loss of on-policy distillation.

    Args:
        factor: f as a function of the noise level. ``velocity``: 1, all levels count equally (DanceOPD).
            ``mean_match``: c²/2, half the squared difference of the steps' means (UniRL's default); without noise it
            is Δ²/2, as in DiffusionOPSD's own distillation up to the ½. ``kl_exact``: c²/2s²Δ, the KL divergence of
            the two steps; for a flow it falls with the noise level.

    Note:
        verl-omni and Flow-OPD divide by 2s² where the KL divergence of the steps has 2s²Δ.
    """

    def __init__(self, factor: Factor = "mean_match") -> None:
        super().__init__()
        check_choices(OnPolicyLoss, factor=factor)
        self.factor = factor

    def forward(self, output: Tensor, teachers: Tensor, slope: Tensor, std: Tensor) -> Tensor:
        """Compute the loss of each of B noisy states: ``(B,)`` float64, float32 on mps.

        Args:
            output: ``(B, C, ...)`` the policy's output.
            teachers: ``(J, B, C, ...)`` outputs of the teachers, without gradient.
            slope: ``(B,)`` c: change of the step's mean for a change of the output.
            std: ``(B,)`` s√Δ: standard deviation of the step; positive for ``kl_exact``.
        """
        error = torch.stack([squared_error(output, one.detach()) for one in teachers]).mean(dim=0)
        square = slope.to(error).square()
        match self.factor:
            case "mean_match":
                return square / 2 * error
            case "kl_exact":
                return square / (2 * std.to(error).square()) * error
        return error
