r"""Losses of preference pairs: base class, gather of the pairs of all ranks, Bradley–Terry, Thurstone.

A loss is written for a single process with the global batch: each rank computes it over the rows of all ranks. The
backward of the gather sums the gradients that all ranks have for a row, and gives the sum to the rank that owns the
row. Gradients of a rank's own rows are then world size times those of a single process; averaging over ranks (DDP,
FSDP) gives exactly the single-process gradient of every parameter.

Thurstone's model has a noise-calibrated comparison variance (DiNa-LRM, arXiv:2602.11146):

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
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from latentreward.core.contracts import PairScores, PairTargets, widest_float
from latentreward.core.errors import check_choices, check_range
from latentreward.core.promises import Part, detached, finite, returns, wrong_tensor


def per_row(values: Tensor, margin: Tensor) -> Tensor:
    """Reshape one value per pair, ``(B,)``, to broadcast against a margin ``(B,)`` or ``(B, out_dim)``."""
    return values.reshape(-1, *(1,) * (margin.ndim - 1))


def mean_over_outputs(values: Tensor) -> Tensor:
    """Average the columns of a head with several outputs: ``(B, out_dim)`` or ``(B,)`` to ``(B,)``."""
    return values if values.ndim == 1 else values.mean(dim=1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the weighted mean over pairs, :math:`\sum_i w_i l_i / \sum_i w_i`; 0 if every weight is 0.

    Values and weights are ``(B,)``; weights need not sum to 1. The result has the dtype of ``values``.
    """
    weight = weight.to(values.dtype)
    # The least positive number keeps a batch without weight at 0 / tiny = 0 instead of NaN.
    return (weight * values).sum() / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)


class SetLoss(nn.Module, Part):
    """Base class of losses that show their settings in ``print(model)``.

    Attributes:
        changes_buffers: Whether buffers of the loss may change in training; checkpoints of trainable weights then hold
            them too.
    """

    changes_buffers: bool = True

    def extra_repr(self) -> str:
        """Return the loss's numbers and choices, for ``print(model)``."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if not isinstance(value, bool))


def _wrong_losses(losses: Tensor, scores: PairScores, shape: Sequence[int]) -> str | None:
    problem = wrong_tensor(losses, shape) if finite(scores.margin) else None
    return problem or detached(losses, scores.margin)


class PreferenceLoss(SetLoss):
    """Base class of losses over preference pairs.

    ``forward`` needs the pairs of the global batch: with several processes, gather those of all ranks with
    :func:`latentreward.reward.gather_pair_scores` first. Weights are then normalised over the pairs of all ranks, and
    the average of the ranks' gradients, as in DDP, equals the gradient of a single process with all pairs.

    The loss per pair is computed in float64, which costs little for B numbers: with soft labels the gradient is a
    difference of nearly equal terms, imprecise in float32. The result is float32, also under autocast.

    Attributes:
        needs_cross_scores: Whether ``scores.cross`` must be given: scores of every image with every prompt of the
            batch.
    """

    needs_cross_scores: bool = False

    @abstractmethod
    @returns(lambda found, loss, scores: _wrong_losses(found, scores, scores.label.shape))
    def per_pair(self, scores: PairScores) -> Tensor:
        """Compute the unweighted loss of each pair, averaged over the outputs of the head: ``(B,)``, float64."""

    @abstractmethod
    @returns(
        lambda found, loss, scores: (
            wrong_tensor(found, scores.chosen.shape, low=0.0, high=1.0) if finite(scores.margin) else None
        )
    )
    def win_probability(self, scores: PairScores) -> Tensor:
        """Compute the probability that chosen wins under this loss's model: shape of the scores, float32."""

    @returns(lambda found, loss, scores: _wrong_losses(found, scores, ()))
    def forward(self, scores: PairScores) -> Tensor:
        """Compute the weighted mean of :meth:`per_pair`, a float32 scalar, over the pairs of all ranks."""
        rows, (chosen, rejected) = scores.chosen.shape[:1], (tuple(s.shape) for s in (scores.chosen, scores.rejected))
        if len(chosen) not in (1, 2) or rejected != chosen:
            raise ValueError(f"chosen {chosen} and rejected {rejected} must both be (B,) or (B, out_dim)")
        for name in ("label", "weight", "chosen_sigmas", "rejected_sigmas"):
            if getattr(scores, name).shape != rows:  # (1,) would broadcast silently
                raise ValueError(f"{name} has shape {tuple(getattr(scores, name).shape)}, expected {tuple(rows)}")
        if widest_float(scores.chosen.device) != torch.float64:
            scores = scores.to("cpu")
        return weighted_mean(self.per_pair(scores), scores.weight).float()


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


class _GatherRows(torch.autograd.Function):
    """All-gather of ``(sizes[rank], ...)`` to ``(sum(sizes), ...)``; backward is an all-reduce, cut to the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # all_gather wants equal shapes, and ranks may have different numbers of rows.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        blocks = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(blocks, padded)
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        # all_reduce works in place, and autograd may use the gradient elsewhere.
        total = grad_output.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.split(ctx.sizes)[distributed.get_rank()], None


def gather_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order; gradients flow back to the rank that owns a row.

    This is a collective call: every rank must make it, and if gradients are needed, every rank must run backward. Ranks
    may have different numbers of rows ``(B_rank, ...)`` (batches of different aspect buckets), but of one dtype and
    trailing shape. If there is one process, ``rows`` itself is returned.
    """
    world_size = _world_size()
    if world_size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return _GatherRows.apply(rows, torch.cat(counts).tolist())


def gather_pair_scores(scores: PairScores) -> PairScores:
    """Gather the pairs of all ranks, in rank order, float32, in one collective call, and one more for targets.

    ``scores.cross`` is returned as given: these scores are computed from embeddings that are gathered already
    (:func:`gather_with_grad`), so they span all ranks. If there is one process, ``scores`` itself is returned.
    """
    if _world_size() == 1:
        return scores
    names = ("chosen", "rejected", "label", "weight", "chosen_sigmas", "rejected_sigmas")
    if scores.targets is not None:
        given = [tensor for field in fields(PairTargets) if (tensor := getattr(scores.targets, field.name)) is not None]
        gathered = gather_with_grad(torch.stack([tensor.float() for tensor in given], dim=1)).unbind(dim=1)
        scores = replace(scores, targets=PairTargets(*gathered))
    # One collective call for six columns: each costs a round trip.
    table = torch.cat([getattr(scores, name).float().reshape(len(scores.label), -1) for name in names], dim=1)
    rewards, rest = gather_with_grad(table).tensor_split([table.shape[1] - 4], dim=1)
    chosen, rejected = (half.reshape(-1, *scores.chosen.shape[1:]) for half in rewards.chunk(2, dim=1))
    return replace(scores, **dict(zip(names, (chosen, rejected, *rest.unbind(dim=1)), strict=True)))


def bradley_terry_nll(margin: Tensor, label: Tensor) -> Tensor:
    r"""Compute the negative log-likelihood of a soft label under Bradley–Terry.

    .. math:: l = -y \log\sigma(d) - (1 - y) \log\sigma(-d), \qquad \partial l / \partial d = \sigma(d) - y

    The margin d is the chosen minus the rejected reward, ``(B,)`` or ``(B, out_dim)``; the label y, broadcastable to
    it, the probability that chosen wins. The loss is float64 in the shape of ``margin``; loss and gradient are finite
    for every finite float32 margin.
    """
    margin, label = margin.double(), label.double()
    return -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin)


class BradleyTerryLoss(PreferenceLoss):
    r"""Bradley–Terry negative log-likelihood, optionally with a margin that the winner has to exceed.

    .. math:: l = \mathrm{NLL}\bigl(d - (2y - 1)\,m,\; y\bigr)

    A certain label (y = 1) gives :math:`-\log\sigma(d - m)`, the released form. The required margin shrinks as the
    label gets less certain, and is 0 for a tie (y = ½), which has no winner. The loss is symmetric: exchanging chosen
    and rejected changes nothing.

    Args:
        margin: Margin m, in reward units, at least 0; the gradient of a pair with label 1 fades only once d exceeds m.
    """

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        check_range("[0, inf)", "0 is plain Bradley–Terry", margin=margin)
        self.margin = margin

    def per_pair(self, scores: PairScores) -> Tensor:
        margin = scores.margin.double()
        label = per_row(scores.label.double(), margin)
        return mean_over_outputs(bradley_terry_nll(margin - (2 * label - 1) * self.margin, label))

    def win_probability(self, scores: PairScores) -> Tensor:
        """Return ``sigmoid(d)``, without the margin, which only shapes the training loss."""
        return torch.sigmoid(scores.margin)


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

    Noise levels are ``(B,)`` in [0, 1], ``k`` is a factor on their variance, and ``sigma_u`` the standard deviation of
    judging one clean image, in reward units as the result, ``(B,)`` float64.
    """
    # Variances of the two judgements add up; the images may have different noise levels (LRM).
    variance = k * (chosen_sigmas.double() ** 2 + rejected_sigmas.double() ** 2) + 2 * sigma_u**2
    return variance.sqrt()


def thurstone_nll(z: Tensor, label: Tensor) -> Tensor:
    r"""Compute the negative log-likelihood of a soft label, :math:`-y\log\Phi(z) - (1-y)\log\Phi(-z)`.

    ``z`` is the margin in units of the comparison's standard deviation, of any shape; the label y, broadcastable to
    it, the probability that chosen wins. The loss, float64, is quadratic in the margin of a wrongly ranked pair, and
    exceeds float32 only past :math:`|z|` ≈ 2e19.
    """
    z, label = z.double(), label.double()
    return -label * log_ndtr(z) - (1 - label) * log_ndtr(-z)


def mixture_fidelity(z: Tensor, label: Tensor) -> Tensor:
    r"""Compute the fidelity loss as DiNa-LRM defines it (arXiv:2602.11146), with :math:`p = \Phi(z)`.

    .. math:: l = 1 - \sqrt{y p + (1 - y)(1 - p)}, \qquad
        \frac{\partial l}{\partial z} = -\frac{(2y - 1)\,\varphi(z)}{2\sqrt{y p + (1 - y)(1 - p)}}

    The gradient is exactly 0 at y = ½, whatever the margin: nothing is learned from ties. Other soft labels act
    like certain ones, because the minimum for y > ½ lies at z → ∞. Use :func:`bhattacharyya_fidelity` if ties
    should pull rewards together. Arguments are those of :func:`thurstone_nll`; the loss lies in [0, 1).
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
    Arguments are those of :func:`thurstone_nll`.
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
    """

    def __init__(
        self, variance: float = 0.5, objective: Objective = "fidelity", form: FidelityForm = "mixture"
    ) -> None:
        check_range("[1e-12, 1e12]", "the released code uses 0.5", variance=variance)
        super().__init__(objective=objective, form=form, k=0.0, sigma_u=math.sqrt(variance))
