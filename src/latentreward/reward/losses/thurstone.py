r"""Thurstone's model with noise-calibrated comparison variance (DiNa-LRM, arXiv:2602.11146).

.. math:: P(\text{chosen wins}) = \Phi(z), \qquad
    z = \frac{r^+ - r^-}{\sqrt{\tau^2(t_c) + \tau^2(t_r)}}, \qquad \tau^2(t) = k\,\sigma(t)^2 + \sigma_u^2

:math:`\tau^2(t)`, in the paper :math:`\sigma_u^2(t)`, is the variance of judging one image at noise level σ(t). With
one timestep for both images the denominator is :math:`\sqrt{2\,\tau^2(t)}`. All losses are computed from
:math:`\log\Phi`. The released form :math:`1 - \sqrt{\Phi(z) + 10^{-6}}` loses half of its gradient at z ≈ -5 and all
of the gradient at -14.5. In exact arithmetic too, the gradient of fidelity falls as exp(-z²/4). At z = -8 it is 1e-7
and that of ``nll`` 8.1, so that only ``nll`` learns from the most wrongly ranked pairs. A pair with label ½ whose
scores differ much has a tiny gradient in ``bhattacharyya`` too: 1e-21 at z = 14.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentreward.core.contracts import PairScores, widest_float
from latentreward.core.errors import check_choices, check_range
from latentreward.reward.losses.base import PreferenceLoss, mean_over_outputs, per_row

Objective = Literal["fidelity", "nll"]
FidelityForm = Literal["mixture", "bhattacharyya"]


class _LogNdtr(torch.autograd.Function):
    """``log Φ`` with a derivative that stays accurate in the left tail.

    The backward of ``torch.special.log_ndtr`` is 4 % off at z = -1000 and 51 % at -4000 in float32 (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.special.log_ndtr(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        # φ(z) / Φ(z). For large z erfcx overflows and the quotient is 0, where the exact value is below 1e-38.
        return grad_output * (math.sqrt(2 / math.pi) / torch.special.erfcx(-z * math.sqrt(0.5)))


def log_ndtr(z: Tensor) -> Tensor:
    r"""Compute the logarithm of the standard normal distribution function; any shape, float32 or float64.

    The gradient :math:`\sqrt{2/\pi} / \mathrm{erfcx}(-z/\sqrt 2)` is exact up to rounding, from the left tail to where
    :math:`\varphi(z)` underflows. There are no second derivatives.
    """
    return _LogNdtr.apply(z)


def comparison_std(chosen_sigmas: Tensor, rejected_sigmas: Tensor, k: float = 2.0, sigma_u: float = 0.1) -> Tensor:
    r"""Compute the standard deviation of a comparison, :math:`\sqrt{\tau^2(t_c) + \tau^2(t_r)}`.

    Args:
        chosen_sigmas: Noise level of the chosen image, ``(B,)`` in [0, 1].
        rejected_sigmas: Noise level of the rejected image, ``(B,)``.
        k: Factor on the noise variance.
        sigma_u: Standard deviation of judging one clean image, in reward units.

    Returns:
        ``(B,)``, float64, in reward units.
    """
    # Variances of the two judgements add up; the images may have different noise levels (LRM).
    variance = k * (chosen_sigmas.double() ** 2 + rejected_sigmas.double() ** 2) + 2 * sigma_u**2
    return variance.sqrt()


def thurstone_nll(z: Tensor, label: Tensor) -> Tensor:
    r"""Compute the negative log-likelihood of a soft label, :math:`-y\log\Phi(z) - (1-y)\log\Phi(-z)`.

    The loss is quadratic in the margin of a wrongly ranked pair, and exceeds float32 only past :math:`|z|` ≈ 2e19.

    Args:
        z: Margin in units of the comparison's standard deviation, any shape.
        label: Probability y that chosen wins, broadcastable to ``z``, in [0, 1].

    Returns:
        Loss in the shape of ``z``, float64.
    """
    z, label = z.double(), label.double()
    return -label * log_ndtr(z) - (1 - label) * log_ndtr(-z)


def mixture_fidelity(z: Tensor, label: Tensor) -> Tensor:
    r"""Compute the fidelity loss as DiNa-LRM defines it (arXiv:2602.11146), with :math:`p = \Phi(z)`.

    .. math:: l = 1 - \sqrt{y p + (1 - y)(1 - p)}, \qquad
        \frac{\partial l}{\partial z} = -\frac{(2y - 1)\,\varphi(z)}{2\sqrt{y p + (1 - y)(1 - p)}}

    The gradient is exactly 0 at y = ½, whatever the margin: nothing is learned from ties. Other soft labels act
    like certain ones, because the minimum for y > ½ lies at z → ∞. Use :func:`bhattacharyya_fidelity` if ties
    should pull rewards together.

    Args:
        z: Margin in units of the comparison's standard deviation, any shape.
        label: Probability y that chosen wins, broadcastable to ``z``, in [0, 1].

    Returns:
        Loss in [0, 1), in the shape of ``z``, float64.
    """
    z, label = _towards_likelier_side(z.double(), label.double())
    # q = (1-y) + (2y-1) p in logarithms: p may underflow, and at y = ½ the term with z is exactly log 0.
    log_q = torch.logaddexp(torch.log1p(-label), torch.log(2 * label - 1) + log_ndtr(z))
    # Not -expm1: torch computes its derivative from the result, which is 0 once the loss rounds to 1.
    return 1 - torch.exp(0.5 * log_q)


def bhattacharyya_fidelity(z: Tensor, label: Tensor) -> Tensor:
    r"""Compute the classical fidelity loss (one minus the Bhattacharyya coefficient), with :math:`p = \Phi(z)`.

    .. math:: l = 1 - \sqrt{y p} - \sqrt{(1 - y)(1 - p)}

    The minimum, 0, lies at p = y, so a tie pulls the margin to 0. For y = 1 the loss equals :func:`mixture_fidelity`.

    Args:
        z: Margin in units of the comparison's standard deviation, any shape.
        label: Probability y that chosen wins, broadcastable to ``z``, in [0, 1].

    Returns:
        Loss in [0, 1], in the shape of ``z``, float64.
    """
    # In logarithms: Φ(z) underflows in float64 below z = −38.
    z, label = _towards_likelier_side(z.double(), label.double())
    agreement = torch.exp(0.5 * (torch.log(label) + log_ndtr(z)))
    return 1 - agreement - torch.exp(0.5 * (torch.log1p(-label) + log_ndtr(-z)))


def _towards_likelier_side(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the sides of pairs with y < ½, so that y is in [½, 1] and log y is finite."""
    return torch.where(label < 0.5, -z, z), torch.where(label < 0.5, 1 - label, label)


class ThurstoneLoss(PreferenceLoss):
    r"""Loss of Thurstone's model, whose comparisons are less certain at higher noise.

    Loss and gradient are finite: ``fidelity`` for every finite float32 margin d, ``nll`` for :math:`|d|` ≤ 1e6.

    Args:
        objective: ``fidelity`` (the published recipe) or ``nll``, the negative log-likelihood.
        form: Form of the fidelity loss: ``mixture`` (the paper's, in which ties have no gradient) or ``bhattacharyya``
            (ties pull the margin to 0). Without effect on ``nll``.
        k: Factor on the noise variance σ(t)² in the variance of judging one image, at least 0.
        sigma_u: Standard deviation of judging one clean image, in reward units, positive.

    Raises:
        InputError: If an argument is out of range.

    Note:
        arXiv:2602.11146 gives sigma_u = 0.1; the released code uses variance 0.05, which is
        ``sigma_u = 0.2236068``.
    """

    def __init__(
        self, objective: Objective = "fidelity", form: FidelityForm = "mixture", k: float = 2.0, sigma_u: float = 0.1
    ) -> None:
        super().__init__()
        check_choices(ThurstoneLoss, objective=objective, form=form)
        check_range("[0, inf)", "arXiv:2602.11146 uses 2, and 0 ignores the noise", k=k)
        check_range("[1e-6, 1e6]", "arXiv:2602.11146 uses 0.1", sigma_u=sigma_u)
        self.objective, self.form, self.k, self.sigma_u = objective, form, k, sigma_u

    def _z(self, scores: PairScores) -> Tensor:
        std = comparison_std(scores.chosen_sigmas, scores.rejected_sigmas, self.k, self.sigma_u)
        return scores.margin.double() / per_row(std, scores.margin)

    def per_pair(self, scores: PairScores) -> Tensor:
        """See :func:`mixture_fidelity`, :func:`bhattacharyya_fidelity` and :func:`thurstone_nll`."""
        z, label = self._z(scores), per_row(scores.label, scores.margin)
        if self.objective == "nll":
            return mean_over_outputs(thurstone_nll(z, label))
        fidelity = mixture_fidelity if self.form == "mixture" else bhattacharyya_fidelity
        return mean_over_outputs(fidelity(z, label))

    def win_probability(self, scores: PairScores) -> Tensor:
        """Return ``Φ(z)``, which tends to ½ as the noise rises."""
        device = scores.chosen.device
        wide = scores if widest_float(device) == torch.float64 else scores.to("cpu")
        return torch.special.ndtr(self._z(wide)).float().to(device)


class ConstantVarianceThurstoneLoss(ThurstoneLoss):
    r"""Thurstone's loss without the noise level: :math:`\sigma_u^2(t)` is a constant (an ablation of the paper).

    Args:
        variance: Variance of judging one image, in squared reward units; 0.5, as released, makes z equal to the margin.
        objective: As in :class:`ThurstoneLoss`.
        form: As in :class:`ThurstoneLoss`.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self, variance: float = 0.5, objective: Objective = "fidelity", form: FidelityForm = "mixture"
    ) -> None:
        check_range("[1e-12, 1e12]", "the released code uses 0.5", variance=variance)
        super().__init__(objective=objective, form=form, k=0.0, sigma_u=math.sqrt(variance))
