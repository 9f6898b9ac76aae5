"""LPO, and SPO before it: a policy learns to prefer, at each sampler step, the next state that scores higher."""

from typing import Any

import torch

from latentreward.alignment.losses.dpo import StepDPO, StepDPOResult, StepPairLoss, StepRatios
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.rewards.base import RewardSource
from latentreward.alignment.rollout.candidates import (
    Branching,
    FixedThreshold,
    PairSelection,
    SigmaThreshold,
    step_pairs,
)
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.core.contracts import PromptBatch, RolloutStatistics, StepPairs, join_rows


class LPOModule(AlignmentModule):
    """Latent Preference Optimisation (arXiv:2502.01051), for any policy and any reward.

    A rollout samples K candidates for the next state at each step inside a window of timesteps. The best and the worst
    candidate become a training pair if their scores differ enough. Both follow the same state, timestep and prompt, so
    one evaluation of the policy and one of the reference give all four log-probabilities. Logs ``train/loss``,
    ``train/implicit_accuracy``, ``train/margin``, ``train/clamped``.

    Args:
        reward: Source of the reward, which scores the candidates.
        selection: Rule that keeps pairs; None takes LPO's thresholds for SD1.5.
        sampling: Sampler settings of the rollouts, also used in training; None takes LPO's 20 DDIM steps with eta 1.
        candidates: Number of candidates, window, and the candidate with which rollouts go on; None takes LPO's 4
            candidates at every step.
        beta: β of LPO's loss, :class:`~latentreward.alignment.StepDPO`.
        clip_range: ε of LPO's loss.
        loss: Another loss of the pairs, to which ``beta`` and ``clip_range`` do not apply; None takes LPO's.
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

    def compare(self, batch: StepPairs) -> tuple[StepDPOResult, StepRatios]:
        """Compute the loss of a batch of pairs, and each pair's log-probability ratios of policy to reference."""
        with torch.no_grad(), self.policy.reference():
            reference = self.transition(batch)
        # The released code evaluates each network twice per pair; both states follow one Gaussian.
        policy = self.transition(batch)
        chosen, rejected = policy.log_prob(batch.chosen), policy.log_prob(batch.rejected)
        ref_chosen, ref_rejected = reference.log_prob(batch.chosen), reference.log_prob(batch.rejected)
        ratios = StepRatios(batch.timesteps, (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach())
        return self.loss(chosen, rejected, ref_chosen, ref_rejected), ratios

    def training_step(self, batch: StepPairs, batch_idx: int) -> dict[str, Any]:
        result, ratios = self.compare(batch)
        for name, value in result._asdict().items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch), sync_dist=True)
        return {"loss": result.loss, "ratios": ratios}


class SPOModule(LPOModule):
    """Step-aware Preference Optimisation (arXiv:2406.04314).

    :class:`LPOModule` with SPO's settings: one threshold of 0.3 for all steps; candidates only at timesteps up to 751,
    where the released code starts (the paper says 750); rewards at the candidates' own timestep; and β = 10. SPO's
    reward scores the decoded x̂_0 of each candidate (:class:`~latentreward.alignment.PixelReward`).
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
