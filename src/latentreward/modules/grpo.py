"""Group-relative policy optimisation (GRPO): samples of one prompt are judged against each other; no pairs, no critic.

What is sampled are a diffusion sampler's steps (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818). The reward
either judges each step by itself (:class:`StepwiseGRPOModule`) or the finished picture
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
    Sampling,
    Trajectories,
    check_sigmas,
    group_advantages,
    sample_trajectories,
    score_finished,
    tracked_advantages,
)

LEAST_ADVANTAGE = 1e-6
"""Advantages this small come from rounding: those of different scores are near 1, at any scale above 1e-4."""


class GRPOModule(RolloutModule[StepSamples]):
    """What both forms share: the training step on sampled steps.

    Log-probabilities are means over latent elements, as in Flow-GRPO. All steps from one state are learned from in one
    evaluation of the policy, and one of the reference if the loss weighs the divergence from it.

    Args:
        policy: The generator.
        reward: Its judge.
        sampling: Sampler settings of rollouts; its noise is what is explored.
        loss: Clip range ε, weight of the divergence from the reference, bound of advantages.
        options: See :class:`~latentreward.modules.alignment.AlignmentModule`; guidance applies in sampling and in
            training.

    Raises:
        InputError: If the sampler has no noise.
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
        sampler = sampling.sampler(policy.pipeline().config("scheduler"))
        sampler.require_noise()
        super().__init__(policy, reward, **options)
        self.sampling, self.sampler, self.loss = sampling, sampler, loss or ClippedPolicyLoss()

    def training_step(self, batch: StepSamples, batch_idx: int) -> Tensor:
        """Loss of one batch of states with K steps each."""
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
    """Step-wise GRPO: K candidates of each state, advantages among them from the reward of the step itself.

    The reward judges noisy states, so that each step has its own credit (LPO's GRPO form, arXiv:2502.01051; Step-GRPO
    of DRM, arXiv:2605.25661). States whose candidates all score the same are left out.

    Args:
        policy: The generator.
        reward: Scores states.
        sampling: See :class:`GRPOModule`.
        candidates: Number of candidates K, timestep window, and which of them a rollout goes on with.
        loss: See :class:`GRPOModule`.
        options: See :class:`GRPOModule`.

    Raises:
        InputError: If no step of the window has noise.
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
        self.candidates.steps(self.sampler)

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
    """GRPO on whole trajectories: their steps share the advantage that the finished picture has among its prompt's.

    As in Flow-GRPO (arXiv:2505.05470) for flow matching; for DDPM's noise process the same with DDIM steps, in the
    manner of DDPO (arXiv:2305.13301).

    Args:
        policy: The generator.
        reward: Scores finished latents.
        sampling: See :class:`GRPOModule`.
        num_trajectories: Trajectories K per prompt.
        low: Least timestep at which a step is learned from.
        high: Greatest such timestep; steps outside are sampled alike.
        reward_sigmas: Noise levels at which a reward on latents scores them; without effect on one of pixels.
        global_std: Divide advantages by the standard deviation of all rewards of a rollout, over all ranks, instead of
            the prompt's own: prompts on which the reward hardly differs then weigh little (Flow-GRPO's setting).
        loss: See :class:`GRPOModule`.
        options: See :class:`GRPOModule`.

    Raises:
        InputError: If there are fewer than 2 trajectories per prompt, or no step of the window has noise.
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
        **options: Any,
    ) -> None:
        if num_trajectories < 2:
            raise InputError(f"num_trajectories={num_trajectories} leaves nothing to compare; use at least 2")
        check_sigmas(reward_sigmas)
        super().__init__(policy, reward, sampling, loss, **options)
        self.num_trajectories, self.global_std = num_trajectories, global_std
        self.reward_sigmas = tuple(reward_sigmas)
        self.trained_steps = Branching(num_trajectories, low, high).steps(self.sampler)

    def make_experience(self, prompts: PromptBatch) -> StepSamples | None:
        """See :meth:`RolloutModule.make_experience`."""
        count = self.num_trajectories
        repeated = PromptBatch(
            tuple(prompt for prompt in prompts.prompts for _ in range(count)),
            tuple(f"{key}/{number}" for key in prompts.keys for number in range(count)),
        )
        trajectories = sample_trajectories(
            self.policy, self.sampler, repeated, self.sampling, self.guidance_scale, self.seed
        )
        rewards = score_finished(self.reward, trajectories.finished, prompts, self.seed, self.reward_sigmas)
        rewards = rewards.view(len(prompts), count)
        self.rollout_statistics = group_statistics(torch.zeros(1), rewards.T[None].cpu())
        advantage = self._advantages(rewards).flatten().cpu()
        return worth_learning(trajectory_samples(trajectories, self.trained_steps, repeated, advantage))

    def _advantages(self, rewards: Tensor) -> Tensor:
        """``(P, K)`` of this rank's rewards ``(P, K)``, by the spread over all ranks' if it is asked for."""
        every = self.all_gather(rewards).reshape(-1, self.num_trajectories)
        groups = torch.arange(len(every), device=every.device).repeat_interleave(self.num_trajectories)
        advantages = tracked_advantages(every.flatten(), groups, self.global_std).view_as(every)
        start = self.trainer.global_rank * len(rewards) if len(every) > len(rewards) else 0
        return advantages[start : start + len(rewards)]


def candidate_samples(step: CandidateStep, prompts: PromptBatch) -> StepSamples:
    """One step's states with their candidates, on the CPU."""
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
    """Some steps of B trajectories, on the CPU, each with the ``advantage`` ``(B,)`` of its trajectory."""
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
    """The rows with an advantage that is not 0, rounding aside; None if there are none."""
    joined = join_rows(samples)
    rows = (joined.advantage.abs() > LEAST_ADVANTAGE).any(dim=1).nonzero().flatten().tolist()
    return take_rows(joined, rows) if rows else None


def group_statistics(timesteps: Tensor, scores: Tensor) -> RolloutStatistics:
    """Statistics from scores ``(S, K, P)`` of K candidates each; groups of equal scores are not kept."""
    gap = ((scores.amax(dim=1) - scores.amin(dim=1)) / 2).tanh()
    return RolloutStatistics(timesteps, scores, gap, gap > 0)
