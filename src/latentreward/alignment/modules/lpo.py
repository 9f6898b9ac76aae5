r"""LPO, and SPO before it: a policy learns to prefer, at each sampler step, the next state that scores higher.

Step-level DPO: raise the probability of the better of two next states that a sampler drew from one state.

.. math:: l = -\log\sigma(\beta \log r_w - \beta \log r_l), \qquad
    r = \mathrm{clamp}\Bigl(\frac{p_\theta(x_{t-1} \mid x_t, c)}{p_{\mathrm{ref}}(x_{t-1} \mid x_t, c)},
    \; 1 \pm \epsilon\Bigr)

LPO (arXiv:2502.01051) and SPO (arXiv:2406.04314), after DPO (arXiv:2305.18290, eq. 7).
"""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rollout.candidates import Branching
from latentreward.alignment.rollout.pair_selection import FixedThreshold, PairSelection, SigmaThreshold, step_pairs
from latentreward.alignment.rollout.samplers import Sampling, Transition
from latentreward.core.contracts import PromptBatch, RolloutStatistics, StepPairs, join_rows, to_float64
from latentreward.core.errors import check_range
from latentreward.core.promises import detached, of_class, returns, wrong_tensor
from latentreward.reward.losses.base import SetLoss


def clamped_log_ratio(log_prob: Tensor, reference: Tensor, clip_range: float) -> Tensor:
    r"""Compute :math:`\log\mathrm{clamp}(\exp(\log p - \log p_{\mathrm{ref}}), 1 \pm \epsilon)`, ``(B,)`` float64.

    The logarithm is clamped instead of the ratio: the result is the same, and exp cannot overflow. A clamped entry has
    no gradient.

    Args:
        log_prob: ``(B,)`` log-probabilities under the policy.
        reference: ``(B,)`` log-probabilities under the reference.
        clip_range: ε, in (0, 1).
    """
    difference = to_float64(log_prob) - to_float64(reference)
    return difference.clamp(math.log1p(-clip_range), math.log1p(clip_range))


class StepDPOResult(NamedTuple):
    """Loss and training statistics; all scalars, float32.

    Attributes:
        loss: Mean over the pairs.
        implicit_accuracy: Share of pairs whose clamped probability ratio is greater for the chosen state.
        margin: Mean of the chosen state's clamped ratio − the rejected state's; not DPO's margin β·Δlog-ratio.
        clamped: Share of pairs with at least one clamped ratio.
    """

    loss: Tensor
    implicit_accuracy: Tensor
    margin: Tensor
    clamped: Tensor


class StepPairLoss(SetLoss):
    """Base class of losses of pairs of next states, from their log-probabilities under policy and reference."""

    @abstractmethod
    @returns(
        lambda found, loss, chosen, *given: (
            of_class(StepDPOResult)(found) or wrong_tensor(found.loss, (), "floats") or detached(found.loss, chosen)
        )
    )
    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> StepDPOResult:
        """Compute the loss of B pairs.

        Args:
            chosen: ``(B,)`` log-probability of the better next state under the policy.
            rejected: ``(B,)`` log-probability of the worse next state under the policy.
            ref_chosen: ``(B,)`` log-probability of the better next state under the reference, without gradient.
            ref_rejected: ``(B,)`` log-probability of the worse next state under the reference, without gradient.
        """


class StepDPO(StepPairLoss):
    """Step-level DPO with clamped ratios.

    The loss is computed in float64: a log-ratio of some 1e-4 is the difference of two numbers near 1, and β magnifies
    the rounding error of that difference. The results are float32, also under autocast.

    Args:
        beta: β; 500 in LPO, 10 in SPO.
        clip_range: ε, in (0, 1); the papers use 0.1.

    Note:
        The released code computes log(sigmoid(x)) in float32, which is infinite for x below −88.7; β = 500 and ε = 0.1
        reach −100.3. Here such a pair has a finite loss, and no gradient because both ratios are clamped.
    """

    def __init__(self, beta: float = 500.0, clip_range: float = 0.1) -> None:
        super().__init__()
        check_range("(0, inf)", "LPO uses 500, SPO 10", beta=beta)
        check_range("(0, 1)", "LPO and SPO use 0.1", clip_range=clip_range)
        self.beta, self.clip_range = beta, clip_range

    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> StepDPOResult:
        chosen, rejected, ref_chosen, ref_rejected = map(to_float64, (chosen, rejected, ref_chosen, ref_rejected))
        # The released code clamps the ratio in float32, where a difference of 1e-4 has three digits.
        win_log_ratio = clamped_log_ratio(chosen, ref_chosen, self.clip_range)
        lose_log_ratio = clamped_log_ratio(rejected, ref_rejected, self.clip_range)
        loss = -logsigmoid(self.beta * (win_log_ratio - lose_log_ratio)).mean()
        with torch.no_grad():
            clamped = (win_log_ratio != chosen - ref_chosen) | (lose_log_ratio != rejected - ref_rejected)
            parts = (win_log_ratio > lose_log_ratio, win_log_ratio.exp() - lose_log_ratio.exp(), clamped)
        return StepDPOResult(loss.float(), *(part.double().mean().float() for part in parts))


class StepRatios(NamedTuple):
    """Log-probability ratios of policy to reference on B pairs, for callbacks.

    Attributes:
        timesteps: ``(B,)``.
        chosen: ``(B,)`` log-probability of the better next state, policy minus reference.
        rejected: ``(B,)`` log-probability of the worse next state, policy minus reference.
    """

    timesteps: Tensor
    chosen: Tensor
    rejected: Tensor


class LPOModule(AlignmentModule):
    """Latent Preference Optimisation (arXiv:2502.01051), for any policy and any reward.

    A rollout samples K candidates for the next state at each step inside a window of timesteps. The best and the worst
    candidate become a training pair if their scores differ enough. The two states of a pair follow the same state,
    timestep and prompt, so one evaluation of the policy and one of the reference give all four log-probabilities (the
    released code evaluates each network twice).

    Logs ``train/loss``, ``train/implicit_accuracy``, ``train/margin``, ``train/clamped``.

    Args:
        policy: The generator.
        reward: Source of the reward, which scores the candidates.
        selection: Rule that keeps pairs; None takes LPO's thresholds for SD1.5.
        sampling: Sampler settings of the rollouts, also used in training; None takes LPO's 20 DDIM steps with eta 1.
        candidates: Number of candidates, window, and the candidate with which rollouts go on; None takes LPO's 4
            candidates at every step.
        beta: β of LPO's loss, :class:`~latentreward.alignment.StepDPO`.
        clip_range: ε of LPO's loss.
        loss: Another loss of the pairs, to which ``beta`` and ``clip_range`` do not apply; None takes LPO's.
        options: See :class:`~latentreward.alignment.AlignmentModule`.
    """

    experience = StepPairs

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        selection: PairSelection | None = None,
        sampling: Sampling | None = None,
        candidates: Branching | None = None,
        beta: float = 500.0,
        clip_range: float = 0.1,
        loss: StepPairLoss | None = None,
        **options: Any,
    ) -> None:
        sampling, candidates = (sampling or Sampling()).with_noise(), candidates or Branching()
        loss, sampler = loss or StepDPO(beta, clip_range), sampling.sampler(policy.resolve_family())
        # Before weights are loaded: a window without noise leaves nothing to compare.
        candidates.training_steps(sampler)
        super().__init__(policy, reward, **options)
        self.loss, self.sampler, self.selection = loss, sampler, selection or SigmaThreshold(0.35, 0.5)
        self.sampling, self.candidates = sampling, candidates

    def make_experience(self, prompts: PromptBatch) -> StepPairs | None:
        """See :meth:`AlignmentModule.make_experience`; returns the kept pairs of all steps."""
        found, seen = [], []
        for step in self.candidate_steps(prompts):
            selected = self.selection.select(step, self.sampler)
            found.append(step_pairs(step, selected, prompts))
            seen.append((step.scores.cpu(), selected.gap.cpu(), selected.kept.cpu()))
        timesteps = self.sampler.timesteps[self.candidates.steps(self.sampler)]
        self.rollout_statistics = RolloutStatistics(timesteps, *map(torch.stack, zip(*seen, strict=True)))
        pairs = join_rows(found)
        return pairs if len(pairs) else None

    def describe_rollouts(self) -> str:
        """Summarise the score gaps of the last rollout, and say which setting to change."""
        return f"{super().describe_rollouts()}; set model.selection to thresholds below them, or to QuantileThreshold"

    def transitions(self, batch: StepPairs) -> tuple[Transition, Transition]:
        """Return the distributions of the next states under policy (with gradient) and reference (without)."""
        with torch.no_grad(), self.policy.reference():
            reference = self.transition(batch)
        return self.transition(batch), reference

    def compare(self, batch: StepPairs) -> tuple[StepDPOResult, StepRatios]:
        """Compute the loss of a batch of pairs, and each pair's log-probability ratios of policy to reference."""
        # The released code evaluates each network twice per pair; both states follow one Gaussian.
        policy, reference = self.transitions(batch)
        chosen, rejected = policy.log_prob(batch.chosen), policy.log_prob(batch.rejected)
        ref_chosen, ref_rejected = reference.log_prob(batch.chosen), reference.log_prob(batch.rejected)
        ratios = StepRatios(batch.timesteps, (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach())
        return self.loss(chosen, rejected, ref_chosen, ref_rejected), ratios

    def training_step(self, batch: StepPairs, batch_idx: int) -> dict[str, Any]:
        """Return the ``loss`` of a batch, and as ``ratios`` a :class:`StepRatios` for callbacks."""
        result, ratios = self.compare(batch)
        for name, value in result._asdict().items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch), sync_dist=True)
        return {"loss": result.loss, "ratios": ratios}


class SPOModule(LPOModule):
    """Step-aware Preference Optimisation (arXiv:2406.04314).

    :class:`LPOModule` with SPO's settings: one threshold of 0.3 for all steps; candidates only at timesteps up to 751,
    so that the first four of 20 DDIM steps sample a single state; rewards at the candidates' own timestep; and β = 10.
    SPO's reward, the step-aware preference model, scores the decoded x̂_0 of each candidate
    (:class:`~latentreward.alignment.PixelReward`).

    Args:
        policy: See :class:`LPOModule`.
        reward: See :class:`LPOModule`.
        selection: Rule that keeps pairs; None takes SPO's threshold.
        candidates: See :class:`LPOModule`; None takes SPO's window and timestep of scoring.
        beta: β of the loss.
        options: See :class:`LPOModule`.

    Note:
        The paper says t ≤ 750; the first step with candidates in the released code starts from 751, as here.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        selection: PairSelection | None = None,
        candidates: Branching | None = None,
        beta: float = 10.0,
        **options: Any,
    ) -> None:
        selection = selection or FixedThreshold(0.3)
        candidates = candidates or Branching(high=751.0, score_at="candidate")
        super().__init__(policy, reward, selection, candidates=candidates, beta=beta, **options)
