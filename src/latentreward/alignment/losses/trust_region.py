"""Trust regions of GRPO: rules that keep a policy near the one that sampled, or near the reference."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from latentreward.alignment.losses.clipped_policy import ClippedPolicyLoss, clipped_objective
from latentreward.core.contracts import to_float64
from latentreward.core.errors import InputError, check_range
from latentreward.core.promises import Part, detached, returns, shown, tensor, wrong_tensor

if TYPE_CHECKING:
    from latentreward.alignment.rewards.base import RewardSource

Taken = Literal["rewards", "parts"]
"""Values of a rollout's samples that a gate may take; see :class:`KLGate`."""


class TrustRegion(Part):
    """Base class of :class:`RatioRule`, :class:`KLGate` and :class:`Penalty`, from which rules derive.

    A module takes one rule or a list, with at most one of each kind.
    """

    # What the rule changes: ``ratio`` (replaces clipping), ``gate`` (selects the samples that get the KL term) or
    # ``penalty`` (adds a term).
    kind = ""

    def check(self, loss: ClippedPolicyLoss, reward: RewardSource, gaussian: bool) -> None:
        """Raise InputError, before anything is loaded, if the rule does not go with loss and reward.

        ``gaussian`` tells whether log-probabilities of steps are those of Gaussians.
        """
        if loss.takes_process:
            name = type(self).__name__
            raise InputError(f"trust_region: {name} has no form for loss OutcomeProcessLoss; use ClippedPolicyLoss")


@dataclass(frozen=True)
class StepDrift:
    """How far the mean of each step has moved since the rollout, N steps."""

    squares: Tensor  # ``(N,)`` mean square of μ − μ_old over elements, with the gradient of μ
    std: Tensor  # ``(N,)`` standard deviation of the step's noise, s√Δ
    spread: Tensor  # ``(N,)`` s: for a flow the same without √Δ; see :class:`latentreward.alignment.Transition`
    mean_spread: Tensor  # Mean of s over the batch of all ranks, a scalar
    mean_length: Tensor  # Mean of √Δ over the batch of all ranks, a scalar

    @classmethod
    def between(
        cls, mean: Tensor, old_mean: Tensor, std: Tensor, spread: Tensor, every: Tensor | None = None
    ) -> StepDrift:
        """Compute the drift from the means ``(N, C, ...)`` of the policy's steps, now and when they were sampled.

        ``every`` ``(..., 2, N)`` are spread and √Δ of the batches of all ranks; None for this rank's batch alone.
        """
        if every is None:
            every = torch.stack([spread, std / spread])
        mean, old_mean, std, spread, every = map(to_float64, (mean, old_mean, std, spread, every))
        squares = (mean - old_mean).square().flatten(1).mean(dim=1)
        return cls(squares, std, spread, *every.transpose(-2, -1).reshape(-1, 2).mean(dim=0))


def _wrong_objective(found: tuple[Tensor, ...], rule: RatioRule, log_ratio: Tensor, *given: object) -> str | None:
    if not isinstance(found, tuple) or len(found) != 3:
        return f"{shown(found)}; it must be three tensors: objective, ratios, and which steps were held back"
    objective, ratio, held = found
    ratio = ratio.nan_to_num() if isinstance(ratio, Tensor) else ratio  # infinite where a step is left out
    shape = log_ratio.shape
    problem = wrong_tensor(objective, shape) or wrong_tensor(ratio, shape) or wrong_tensor(held, shape, "bool")
    return problem or detached(objective, log_ratio)


class RatioRule(TrustRegion):
    """Rule that replaces PPO's clipping."""

    kind = "ratio"

    @abstractmethod
    @returns(_wrong_objective)
    def objective(
        self, log_ratio: Tensor, advantage: Tensor, clip_range: float, drift: StepDrift
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the objective of N steps, as :func:`~latentreward.alignment.losses.clipped_policy.clipped_objective`.

        Returns:
            The objective ``(N,)``, the ratios ``(N,)``, and whether the rule clipped or left out each step ``(N,)``.
        """


class GRPOGuard(RatioRule):
    r"""GRPO-Guard (arXiv:2510.22319): ratios without the bias of a large step.

    .. math:: \rho = \exp\bigl((\log p_\theta - \log p_{\mathrm{old}} + b)\, \bar s\bigr), \qquad
        b = \langle(\mu - \mu_{\mathrm{old}})^2\rangle / 2 \bar s^2

    with :math:`\bar s` the mean of s times the mean of √Δ over the batch. PPO's objective of ρ is divided by the square
    of the mean of √Δ. b cancels the quadratic term of the log-ratio exactly and has a gradient.

    Args:
        per_step: Take :math:`\bar s = s\sqrt\Delta` of each step, and do not divide (as Flow-Factory does); else as
            verl-omni does.
    """

    def __init__(self, per_step: bool = False) -> None:
        self.per_step = per_step

    def check(self, loss: ClippedPolicyLoss, reward: RewardSource, gaussian: bool) -> None:
        super().check(loss, reward, gaussian)
        if not gaussian:
            raise InputError("trust_region: GRPOGuard needs Gaussian log-probabilities, unlike sampling.flow_noise=cps")

    def objective(
        self, log_ratio: Tensor, advantage: Tensor, clip_range: float, drift: StepDrift
    ) -> tuple[Tensor, Tensor, Tensor]:
        # verl-omni's code takes means over the batch, Flow-Factory's the step's own.
        scale = drift.std if self.per_step else drift.mean_spread * drift.mean_length
        bias = drift.squares / (2 * scale**2)
        rows, ratio, clipped = clipped_objective((log_ratio + bias) * scale, advantage, clip_range)
        return rows if self.per_step else rows / drift.mean_length**2, ratio, clipped


class FlowDPPO(RatioRule):
    r"""Flow-DPPO (arXiv:2606.11025): leave out a step that has moved too far and would move further.

    A step has moved too far if :math:`\langle(\mu - \mu_{\mathrm{old}})^2\rangle / 2 s^2\Delta` reaches the threshold.
    It would move further if its ratio is above 1 and its advantage positive, or below 1 and negative. The loss is the
    mean over all steps of −A·ρ, with 0 for those left out. The loss's ``clip_range`` is not used; the paper does not
    bound advantages either (``max_advantage: null``).

    Args:
        threshold: Least divergence that counts as too far; 1e-5 in the released settings.
        scaled: Whether the divergence is divided by s²Δ.
    """

    def __init__(self, threshold: float = 1e-5, scaled: bool = True) -> None:
        check_range("[0, inf]", "Flow-DPPO uses 1e-5", threshold=threshold)
        self.threshold, self.scaled = threshold, scaled

    def divergence(self, drift: StepDrift) -> Tensor:
        """Return the divergence of each step ``(N,)``, without gradient."""
        return (drift.squares / (2 * drift.std**2 if self.scaled else 2)).detach()

    def objective(
        self, log_ratio: Tensor, advantage: Tensor, clip_range: float, drift: StepDrift
    ) -> tuple[Tensor, Tensor, Tensor]:
        ratio = log_ratio.exp()
        further = ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))
        # PPO clips by the ratio; here the divergence of the step decides, whatever the ratio.
        left_out = (self.divergence(drift) >= self.threshold) & further
        # the inner where keeps an infinite ratio out of the gradient
        kept = torch.where(left_out, 0.0, log_ratio).exp()
        return torch.where(left_out, 0.0, -advantage * kept), ratio, left_out


class Penalty(TrustRegion):
    """Rule that adds a term to the loss."""

    kind = "penalty"

    def check(self, *given: Any) -> None:
        """Accept everything: a term goes with any loss and reward."""

    @abstractmethod
    @returns(lambda found, rule, prediction, reference: wrong_tensor(found, ()) or detached(found, prediction))
    def penalty(self, prediction: Tensor, reference: Tensor) -> Tensor:
        """Compute the penalty, a scalar, of outputs ``(N, C, ...)``; no gradient flows to the ``reference``."""


class NormGuard(Penalty):
    r"""Penalty on predictions whose norm exceeds that of the reference's.

    .. math:: \lambda\,\mathrm{mean}_i\,\mathrm{relu}(\|v_i\| / \|v_{\mathrm{ref},i}\| - 1)^2

    Ours, after the observation of NormGuard (arXiv:2606.27771) that reinforcement learning inflates the norm of the
    velocity; the paper's own form was not released. Predictions at or below the reference's norm cost nothing.

    Args:
        weight: λ.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_range("(0, inf)", weight=weight)
        self.weight = weight

    def penalty(self, prediction: Tensor, reference: Tensor) -> Tensor:
        """See :meth:`Penalty.penalty`; computed in float64, returned in float32 unless predictions are float64."""
        norm, ref_norm = (to_float64(value).flatten(1).norm(dim=1) for value in (prediction, reference.detach()))
        excess = (norm / ref_norm.clamp(min=torch.finfo(torch.float32).tiny) - 1).relu()
        value = self.weight * excess.square().mean()
        return value.to(prediction.device, torch.promote_types(prediction.dtype, torch.float32))


class KLGate(TrustRegion):
    """Rule that selects the samples that get the KL term; the term is 0 for a batch without such samples.

    Attributes:
        takes: Values of K samples of each of P prompts that :meth:`opens` takes: ``rewards`` ``(P, K)``; ``parts``
            ``(P, K, R)``, the scores of R rewards of a mixture, times −1 for a reward with a negative weight.
    """

    kind = "gate"
    takes: Taken = "rewards"

    def check(self, loss: ClippedPolicyLoss, reward: RewardSource, gaussian: bool) -> None:
        super().check(loss, reward, gaussian)
        name = type(self).__name__
        if loss.kl_weight == 0:
            raise InputError(f"trust_region: {name} chooses where the KL term acts; set loss.kl_weight above 0")
        if self.takes == "parts" and len(reward.part_weights) < 2:
            raise InputError(f"trust_region: {name} compares rewards; take a RewardMixture of at least 2")

    @abstractmethod
    @returns(tensor(lambda gate, values: values.shape[:2], "bool"), each=True)
    def opens(self, values: Tensor) -> Tensor:
        """Return which samples of the rollout of all ranks get the KL term: bool ``(P, K)``; see :attr:`takes`."""

    def state(self) -> dict[str, Any]:
        """Return the gate's state for a checkpoint; empty for a gate that does not adapt."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the :meth:`state` of a checkpoint."""


class RankGate(KLGate):
    """GARDO's gate (arXiv:2512.24138): KL term on samples that one reward ranks differently than the others do.

    u is the rank of a sample by the first reward of a mixture minus its mean rank by the others, rank 1 being the
    highest reward of the rollout. As released, the gate selects samples that the first reward ranks *below* the
    others (u > 0); the paper's text has those that it ranks above them, which ``reversed`` selects.

    The gate selects about ``share`` of the samples with u ≥ 0. The share adapts: it grows by a tenth if the mean of
    these u exceeds the means of all of the last 20 rollouts, and shrinks by a tenth if it is below all of them. It
    stays in [0.02, 0.2].

    Args:
        share: Share of samples at the start; 0.1 as released.
        reversed: Select samples that the first reward ranks above the others.
    """

    takes = "parts"

    def __init__(self, share: float = 0.1, reversed: bool = False) -> None:
        check_range("[0.02, 0.2]", "GARDO starts with 0.1", share=share)
        self.share, self.reversed = share, reversed
        self.seen: list[float] = []

    def opens(self, values: Tensor) -> Tensor:
        found = self.uncertainty(values.flatten(0, 1)).unflatten(0, values.shape[:2])
        above = found[found >= 0]
        if not len(above):
            return torch.zeros_like(found, dtype=torch.bool)
        mean = above.mean().item()
        if self.seen and mean > max(self.seen):
            self.share = min(self.share * 1.1, 0.2)
        elif self.seen and mean < min(self.seen):
            self.share = max(self.share * 0.9, 0.02)
        self.seen = [*self.seen, mean][-20:]
        return found > above.quantile(1 - self.share)

    def uncertainty(self, rewards: Tensor) -> Tensor:
        """Compute u ``(N,)`` of N samples from rewards ``(N, R)``, R ≥ 2, the first column that of the main reward."""
        values = to_float64(rewards)
        above = (values[None] > values[:, None]).sum(dim=1)
        ranks = above + ((values[None] == values[:, None]).sum(dim=1) - 1) / 2  # equal rewards share their mean rank
        difference = ranks[:, 0] - ranks[:, 1:].mean(dim=1)
        return -difference if self.reversed else difference

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "seen": list(self.seen)}

    def restore(self, state: dict[str, Any]) -> None:
        self.share, self.seen = float(state["share"]), [float(mean) for mean in state["seen"]]


def check_rules(rules: Sequence[TrustRegion], *used_with: Any) -> dict[str, TrustRegion]:
    """Return rules by their kind, after a check that they go with each other and with what they are used with."""
    kinds: dict[str, TrustRegion] = {}
    for rule in rules:
        name = type(rule).__name__
        if rule.kind in kinds:
            other = type(kinds[rule.kind]).__name__
            raise InputError(f"trust_region: {other} and {name} exclude each other; leave one of them out")
        rule.check(*used_with)
        kinds[rule.kind] = rule
    return kinds
