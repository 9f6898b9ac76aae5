r"""DGPO (arXiv:2510.08425) and CRD (arXiv:2603.14128): preferences between whole groups of samples of a prompt.

Both learn from denoising errors d = ⟨(u − v)²⟩ of K samples of one prompt at one noise level, with the velocity v of
the policy and the target u = ε − x₀. :class:`DGPOLoss` weighs the samples by how sure the group's preference is
already; :class:`CRDLoss` regresses centred implicit rewards on centred advantages.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latentreward.alignment.losses.matching import squared_error
from latentreward.alignment.losses.nft import optimality, self_normaliser
from latentreward.core.errors import check_choices, check_range
from latentreward.reward.losses.base import SetLoss


class DGPOResult(NamedTuple):
    """Loss and its parts."""

    loss: Tensor  # ``policy + kl_weight · kl``, a scalar, float32
    policy: Tensor  # Mean over the samples, a scalar
    kl: Tensor  # Mean squared difference from the reference, a scalar
    weight: Tensor  # ``(G,)`` w of each group, in (0, 1)
    clipped: Tensor  # ``(G, K)`` bool: samples without a gradient from ``policy``


class CRDResult(NamedTuple):
    """Loss and its parts."""

    loss: Tensor  # ``policy + kl_weight · kl``, a scalar, float32
    policy: Tensor  # c/β times the mean of ``rows``, a scalar
    kl: Tensor  # Weighted mean squared difference from the reference, a scalar
    implicit: Tensor  # ``(G, K)`` implicit rewards ρ
    rows: Tensor  # ``(G, K)`` errors of the centred implicit rewards


class DGPOLoss(SetLoss):
    r"""Direct group preference optimisation (arXiv:2510.08425).

    .. math::
        w = \sigma\Bigl(\frac{\beta}{K}\sum_i A_i\,(d_i - d_{\mathrm{ref},i})\Bigr), \qquad
        L = \frac1K \sum_i w\,A_i\,d_i + \lambda\,\langle (v - v_{\mathrm{ref}})^2 \rangle

    w, which has no gradient, is near 0 for a group whose better samples the policy denoises better than the reference
    does. With β = 0 it is ½. A sample whose ratio :math:`e^{d_{\mathrm{old}} - d}` is above 1 + c (A > 0) or below
    1 − c (A ≤ 0) gets no gradient.

    Args:
        beta: β, at least 0. Published for SD3.5-M: 100, for PickScore 10.
        kl_weight: λ, at least 0.
        clip_range: c, in (0, 1), or None. Published: 0.05, for GenEval 0.01.
        max_advantage: Bound: advantages are clamped to [−``max_advantage``, ``max_advantage``].
    """

    def __init__(
        self,
        beta: float = 100.0,
        kl_weight: float = 1e-3,
        clip_range: float | None = 0.05,
        max_advantage: float = 5.0,
    ) -> None:
        super().__init__()
        check_range("[0, inf)", "DGPO uses 100 and 0.001", beta=beta, kl_weight=kl_weight)
        check_range("(0, 1)", "DGPO uses 0.05, null does not clip", clip_range=clip_range)
        check_range("(0, inf)", "DGPO uses 5", max_advantage=max_advantage)
        self.beta, self.kl_weight, self.clip_range, self.max_advantage = beta, kl_weight, clip_range, max_advantage

    def forward(
        self, velocity: Tensor, old: Tensor | None, target: Tensor, advantage: Tensor, reference: Tensor
    ) -> DGPOResult:
        """Compute the loss of G groups of K noised samples, the samples of a group in turn.

        Velocities, of which the older policy's may be None without ``clip_range``, and the target ε − x₀, with one ε
        for a group, are ``(G·K, C, ...)``, advantages ``(G, K)``.
        """
        error = squared_error(velocity, target).view(advantage.shape)
        gain = error.detach() - squared_error(reference.detach(), target).view_as(error)
        bound = advantage.to(error).clamp(-self.max_advantage, self.max_advantage)
        weight = (self.beta * (bound * gain).mean(dim=1)).sigmoid()
        clipped = torch.zeros_like(error, dtype=torch.bool)
        if self.clip_range is not None and old is not None:
            ratio = (squared_error(old.detach(), target).view_as(error) - error.detach()).exp()
            clipped = torch.where(bound > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        policy = (weight[:, None] * bound * torch.where(clipped, error.detach(), error)).mean()
        kl = squared_error(velocity, reference.detach()).mean()
        loss = policy + self.kl_weight * kl
        return DGPOResult(loss.float(), policy.detach(), kl.detach(), weight, clipped)


class CRDLoss(SetLoss):
    r"""Centred reward distillation (arXiv:2603.14128), centred within each prompt as in the paper.

    With r of :func:`~latentreward.alignment.losses.nft.optimality`, w = max(⟨|u − v|⟩, 10⁻⁵) without gradient, and a
    mean :math:`\bar{\cdot}` over the K samples of a prompt,

    .. math::
        \rho = \frac{d_{\mathrm{old}}}{w_{\mathrm{old}}} - \frac{d}{w}, \qquad
        L = \frac{c}{\beta}\bigl(\beta(\rho - \mathrm{sg}[\bar\rho]) - (r - \bar r)\bigr)^2
        + \lambda\,(l + r(1 - l))\,\langle (v - v_{\mathrm{ref}})^2 \rangle,
        \qquad l = \min\Bigl(1, \frac{10^{-4}}{\lambda}\Bigr).

    Args:
        beta: β, positive. Published: 1.
        kl_weight: λ, positive. Published: 0.1. A bad sample's KL term counts l times a good one's.
        max_advantage: c: an advantage of c or more gives r = 1, of −c or less 0.
        temperature: Temperature T of the means: weights are softmax(r/T), and softmax(−r/T) in a second term; the two
            are averaged. None weighs all samples equally.
        form: ``mse``, or ``bce``: binary cross-entropy of logits β(ρ − ρ̄) with the probability σ(r − r̄).
        adaptive: Whether d is divided by w, and the KL term is weighted by r.
    """

    def __init__(
        self,
        beta: float = 1.0,
        kl_weight: float = 0.1,
        max_advantage: float = 5.0,
        temperature: float | None = None,
        form: Literal["mse", "bce"] = "mse",
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        check_choices(CRDLoss, form=form)
        check_range("(0, inf)", "CRD uses 1 and 0.1", beta=beta, kl_weight=kl_weight)
        check_range("(0, inf)", "CRD uses 5", max_advantage=max_advantage)
        check_range("(0, inf)", "null weighs all samples equally", temperature=temperature)
        self.beta, self.kl_weight, self.max_advantage = beta, kl_weight, max_advantage
        self.temperature, self.form, self.adaptive = temperature, form, adaptive

    def forward(self, velocity: Tensor, old: Tensor, target: Tensor, advantage: Tensor, reference: Tensor) -> CRDResult:
        """Compute the loss of G groups of K noised samples; see :meth:`DGPOLoss.forward`, here each with its own ε."""
        share = optimality(advantage, self.max_advantage)
        new, older = (self._error(one, target).view(share.shape) for one in (velocity, old.detach()))
        share, implicit = share.to(new), older - new
        weights = [torch.full_like(share, 1 / share.shape[1])]
        if self.temperature is not None:
            weights = [(sign * share / self.temperature).softmax(dim=1) for sign in (1, -1)]
        rows = torch.stack([self.centred(implicit, share, one) for one in weights]).mean(dim=0)
        policy = self.max_advantage / self.beta * rows.mean()
        least = min(1.0, 1e-4 / self.kl_weight) if self.adaptive else 1.0  # above 1, bad samples would be held hardest
        drift = squared_error(velocity, reference.detach()).view_as(share)
        kl = ((least + share * (1 - least)) * drift).mean()
        loss = policy + self.kl_weight * kl
        return CRDResult(loss.float(), policy.detach(), kl.detach(), implicit.detach(), rows.detach())

    def _error(self, velocity: Tensor, target: Tensor) -> Tensor:
        error = squared_error(velocity, target)
        return error / self_normaliser((velocity - target).to(error).flatten(1)) if self.adaptive else error

    def centred(self, implicit: Tensor, share: Tensor, weights: Tensor) -> Tensor:
        """Compute the error ``(G, K)`` of implicit rewards against r, both less their means with ``weights``."""
        wanted = share - (weights * share).sum(dim=1, keepdim=True)
        logits = self.beta * (implicit - (weights * implicit).sum(dim=1, keepdim=True).detach())
        if self.form == "bce":
            return F.binary_cross_entropy_with_logits(logits, wanted.sigmoid(), reduction="none")
        return (logits - wanted).square()
