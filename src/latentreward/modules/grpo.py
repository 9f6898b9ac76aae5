"""Group-relative policy optimisation (GRPO): a sample's advantage is its reward relative to others of its prompt.

The policy's actions are the steps of a diffusion sampler (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818).
The reward scores each step by itself (:class:`StepwiseGRPOModule`) or the finished image
(:class:`TrajectoryGRPOModule`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentreward.contracts import PromptBatch, RolloutStatistics, StepSamples, join_rows, take_rows
from latentreward.errors import InputError
from latentreward.losses import ClippedPolicyLoss, gaussian_step_kl
from latentreward.modules.alignment import RolloutModule
from latentreward.policies import PolicySource
from latentreward.rewards import RewardSource
from latentreward.rollout import (
    Branching,
    CandidateStep,
    GroupAdvantage,
    GuidedSampler,
    RewardGuidance,
    Sampling,
    Trajectories,
    check_sigmas,
    group_advantages,
    require_gradient,
    sample_trajectories,
    score_finished,
)

LEAST_ADVANTAGE = 1e-6
"""Largest absolute advantage that counts as rounding; scores that differ by more than 1e-4 give advantages near 1."""


class GRPOModule(RolloutModule[StepSamples]):
    """Base of both GRPO modules: the training step on sampled steps.

    Log-probabilities are means over latent elements, as in Flow-GRPO. All K steps from one state need one evaluation of
    the policy, and one of the reference if the loss has a KL term.

    Args:
        policy: The generator.
        reward: Source of the reward.
        sampling: Sampler settings of rollouts; the sampler's noise is the exploration.
        loss: Clip range ε, weight of the KL divergence from the reference, bound of advantages.
        options: See :class:`~latentreward.modules.alignment.AlignmentModule`; guidance applies in sampling and in
            training.

    Raises:
        InputError: If a setting is out of range, the scheduler cannot make the steps, no step has noise, or the reward
            takes latents of another space.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        sampling: Sampling | None = None,
        loss: ClippedPolicyLoss | None = None,
        **options: Any,
    ) -> None:
        sampling = (sampling or Sampling()).with_noise()
        sampler = sampling.sampler(policy.resolve_family())
        sampler.require_noise()
        super().__init__(policy, reward, **options)
        self.sampling, self.sampler, self.loss = sampling, sampler, loss or ClippedPolicyLoss()

    def training_step(self, batch: StepSamples, batch_idx: int) -> Tensor:
        """Return the loss of a batch of states with K sampled steps each."""
        kl = reference = None
        if self.loss.needs_reference:
            with torch.no_grad(), self.policy.reference():
                reference = self.transition(batch)
        transition = self.transition(batch)
        log_prob = transition.log_prob(batch.next_latents.transpose(0, 1)).T
        if reference is not None:
            kl = gaussian_step_kl(transition.mean, reference.mean, transition.spread)
        result = self.loss(log_prob, batch.log_prob, batch.advantage, kl)
        self.log("train/loss", result.loss, prog_bar=True, batch_size=len(batch))
        values = {"clipped": result.clipped, "ratio": result.ratio} | ({} if kl is None else {"kl": result.kl})
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(batch))
        return result.loss


class StepwiseGRPOModule(GRPOModule):
    """Step-wise GRPO: K candidate next states per state, with advantages from the rewards of these candidates.

    The reward scores noisy states, so that each step has its own advantage (LPO's GRPO form, arXiv:2502.01051;
    Step-GRPO of DRM, arXiv:2605.25661). States whose candidates all score equally are left out.

    Args:
        policy: The generator.
        reward: Source of a reward that scores noisy states.
        sampling: See :class:`GRPOModule`.
        candidates: Number of candidates K, timestep window, and the candidate with which a rollout goes on.
        loss: See :class:`GRPOModule`.
        options: See :class:`GRPOModule`.

    Raises:
        InputError: As in :class:`GRPOModule`, or if fewer than two steps with noise lie in the window.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        sampling: Sampling | None = None,
        candidates: Branching | None = None,
        loss: ClippedPolicyLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, sampling, loss, **options)
        self.candidates = candidates or Branching()
        self.candidates.training_steps(self.sampler)

    def make_experience(self, prompts: PromptBatch) -> StepSamples | None:
        """See :meth:`RolloutModule.make_experience`."""
        samples, timesteps, scores = [], [], []
        for step in self.candidate_steps(prompts):
            timesteps.append(step.timestep)
            scores.append(step.scores.float().cpu())
            samples.append(candidate_samples(step, prompts))
        self.rollout_statistics = group_statistics(torch.tensor(timesteps), torch.stack(scores))
        return worth_learning(samples)


class TrajectoryGRPOModule(GRPOModule):
    """GRPO on whole trajectories: every step gets the advantage of its finished image among the K of its prompt.

    Flow matching follows Flow-GRPO (arXiv:2505.05470). DDPM's noise process uses DDIM steps, as DDPO
    (arXiv:2305.13301) does.

    Args:
        policy: The generator.
        reward: Source of a reward that scores finished latents.
        sampling: See :class:`GRPOModule`.
        num_trajectories: Trajectories K per prompt.
        low: Lowest timestep of the steps that are trained on.
        high: Highest timestep of the steps that are trained on. Steps outside are sampled, but not trained on.
        reward_sigmas: Noise levels at which a latent reward scores; without effect on rewards of pixels.
        global_std: Divide advantages by the standard deviation of all rewards of a rollout, over all ranks, instead of
            the prompt's own (Flow-GRPO's setting). Prompts whose rewards hardly differ then have small advantages.
        loss: See :class:`GRPOModule`.
        reward_guidance: Guidance of the rollouts by the reward's gradient (Euphonium, arXiv:2602.04928); the steps'
            log-probabilities are those of the unguided policy. None samples without it.
        options: See :class:`GRPOModule`.

    Raises:
        InputError: As in :class:`GRPOModule`, or if there are fewer than 2 trajectories per prompt, ``low`` lies above
            ``high``, fewer than two steps with noise lie in the window, or ``reward_sigmas`` are no noise levels; with
            ``reward_guidance`` also if the reward scores no noisy states or has no gradient.
    """

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        sampling: Sampling | None = None,
        num_trajectories: int = 8,
        low: float = 0.0,
        high: float = 1000.0,
        reward_sigmas: Sequence[float] = (0.4,),
        global_std: bool = True,
        loss: ClippedPolicyLoss | None = None,
        reward_guidance: RewardGuidance | None = None,
        **options: Any,
    ) -> None:
        if num_trajectories < 2:
            raise InputError(f"num_trajectories={num_trajectories} leaves nothing to compare; use at least 2")
        check_sigmas(reward_sigmas)
        if reward_guidance is not None:
            reward.require_step_scores("reward_guidance")
        super().__init__(policy, reward, sampling, loss, **options)
        self.num_trajectories, self.global_std = num_trajectories, global_std
        self.reward_sigmas, self.reward_guidance = tuple(reward_sigmas), reward_guidance
        self.trained_steps = Branching(num_trajectories, low, high).training_steps(self.sampler)
        if reward_guidance is not None:
            reward_guidance.check(self.sampler)
            require_gradient(self.reward)

    def make_experience(self, prompts: PromptBatch) -> StepSamples | None:
        """See :meth:`RolloutModule.make_experience`."""
        count = self.num_trajectories
        repeated = PromptBatch(
            tuple(prompt for prompt in prompts.prompts for _ in range(count)),
            tuple(f"{key}/{number}" for key in prompts.keys for number in range(count)),
        )
        sampler = self.sampler
        if self.reward_guidance is not None:
            encoded = self.reward.encode_prompts(repeated.prompts)
            sampler = GuidedSampler(sampler, self.reward_guidance, self.reward, encoded)
        trajectories = sample_trajectories(
            self.policy, sampler, repeated, self.sampling, self.guidance_scale, self.seed
        )
        rewards = score_finished(self.reward, trajectories.finished, prompts, self.seed, self.reward_sigmas)
        rewards = rewards.view(len(prompts), count)
        self.rollout_statistics = group_statistics(torch.zeros(1), rewards.T[None].cpu())
        rule = GroupAdvantage("all" if self.global_std else "group")
        advantage = self.advantages(rewards, rule).flatten().cpu()
        return worth_learning(trajectory_samples(trajectories, self.trained_steps, repeated, advantage))


def candidate_samples(step: CandidateStep, prompts: PromptBatch) -> StepSamples:
    """Make a training record of one step's states and their K candidates, on the CPU."""
    return StepSamples(
        keys=tuple(f"{key}/{step.index}" for key in prompts.keys),
        prompts=prompts.prompts,
        latents=step.latents,
        timesteps=torch.full((len(prompts),), step.timestep),
        next_latents=step.candidates.transpose(0, 1),
        log_prob=step.log_prob.T,
        advantage=group_advantages(step.scores).T,
    ).to("cpu")


def trajectory_samples(
    trajectories: Trajectories, steps: Sequence[int], prompts: PromptBatch, advantage: Tensor
) -> list[StepSamples]:
    """Make a training record of each step in ``steps``, on the CPU, with its trajectory's ``advantage`` ``(B,)``."""
    return [
        StepSamples(
            keys=tuple(f"{key}/{index}" for key in prompts.keys),
            prompts=prompts.prompts,
            latents=trajectories.latents[index],
            timesteps=trajectories.timesteps[index].expand(len(prompts)),
            next_latents=trajectories.latents[index + 1][:, None],
            log_prob=trajectories.log_prob[index][:, None],
            advantage=advantage[:, None],
        ).to("cpu")
        for index in steps
    ]


def worth_learning(samples: Sequence[StepSamples]) -> StepSamples | None:
    """Return the rows with an advantage above :data:`LEAST_ADVANTAGE`; None if there are none."""
    joined = join_rows(samples)
    rows = (joined.advantage.abs() > LEAST_ADVANTAGE).any(dim=1).nonzero().flatten().tolist()
    return take_rows(joined, rows) if rows else None


def group_statistics(timesteps: Tensor, scores: Tensor) -> RolloutStatistics:
    """Compute gaps and kept groups from scores ``(S, K, P)`` of K candidates; a group of equal scores is not kept."""
    gap = ((scores.amax(dim=1) - scores.amin(dim=1)) / 2).tanh()
    return RolloutStatistics(timesteps, scores, gap, gap > 0)
