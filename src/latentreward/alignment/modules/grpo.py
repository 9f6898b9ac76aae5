"""Group-relative policy optimisation (GRPO): a sample's advantage is its reward relative to others of its prompt.

The policy's actions are the steps of a diffusion sampler (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818).
The reward scores each step by itself (:class:`StepwiseGRPOModule`) or the finished image
(:class:`TrajectoryGRPOModule`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentreward.alignment.losses.clipped_policy import (
    ClippedPolicyLoss,
    ClippedPolicyResult,
    gaussian_step_kl,
    held_weights,
)
from latentreward.alignment.losses.trust_region import StepDrift, TrustRegion, check_rules
from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.rewards.base import (
    RewardSource,
    begin_finished,
    check_sigmas,
    rows_of,
    score_finished,
    score_states,
)
from latentreward.alignment.rollout.advantages import Advantage, Credit, GroupAdvantage, group_advantages
from latentreward.alignment.rollout.candidates import Branching
from latentreward.alignment.rollout.halving import check_states_reward
from latentreward.alignment.rollout.pruning import FinishedSamples, Pruning
from latentreward.alignment.rollout.reward_guidance import GuidedSampler, RewardGuidance, require_gradient
from latentreward.alignment.rollout.samplers import Sampling
from latentreward.alignment.rollout.step_choice import Window, WindowedSampler
from latentreward.alignment.rollout.trajectories import Trajectories
from latentreward.core.contracts import PromptBatch, RolloutStatistics, StepSamples, join_rows, take_rows
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.running import pair_generator

GATE = "trust_region"
"""Key of a checkpoint with the state of a :class:`~latentreward.alignment.KLGate` that adapts."""

LEAST_ADVANTAGE = 1e-6
"""Largest absolute advantage that counts as rounding; scores that differ by more than 1e-4 give advantages near 1."""


class GRPOModule(AlignmentModule):
    """Base of both GRPO modules: the training step on sampled steps.

    Log-probabilities are means over latent elements, as in Flow-GRPO.

    Args:
        sampling: Sampler settings of rollouts; the sampler's noise is the exploration.
        loss: Clip range ε, weight of the KL divergence from the reference, bound of advantages.
        options: See :class:`~latentreward.alignment.AlignmentModule`.
    """

    experience = StepSamples

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
        self.rules: Mapping[str, Any] = {}

    def optional_fields(self) -> set[str]:
        return set()

    def training_step(self, batch: StepSamples, batch_idx: int) -> Tensor:
        penalty, reference = self.rules.get("penalty"), None
        if self.loss.needs_reference or penalty is not None:
            with torch.no_grad(), self.policy.reference():
                reference = self.prediction(batch)
        prediction = self.prediction(batch)
        result = self.policy_loss(batch, prediction, reference)
        values = {"clipped": result.clipped, "ratio": result.ratio}
        if self.loss.needs_reference and batch.held is None:
            values["kl"] = result.kl
        elif self.loss.needs_reference:  # a sum over this rank's held rows, divided by their mean number
            self.log("train/kl", result.kl, batch_size=len(batch), sync_dist=True)
        loss = result.loss
        if penalty is not None and reference is not None:
            values["penalty"] = added = penalty.penalty(prediction, reference)
            loss = loss + added
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, batch_size=len(batch))
        return loss

    def policy_loss(self, batch: StepSamples, prediction: Tensor, reference: Tensor | None) -> ClippedPolicyResult:
        """Compute the loss from the outputs ``(N, C, ...)`` of the policy and, for a KL term, of the reference."""
        transition = self.sampler.transition(batch.latents, prediction, batch.timesteps)
        # All K candidates follow one state: one pass of the network gives the density of each.
        log_prob = transition.log_prob(batch.next_latents.transpose(0, 1)).T
        weights = self.loss.step_weights(transition.std, transition.spread)
        options: dict[str, Any] = {} if weights is None else {"weights": weights[:, None]}
        kl = None
        if self.loss.needs_reference and reference is not None:
            mean = self.sampler.transition(batch.latents, reference, batch.timesteps).mean
            kl = gaussian_step_kl(transition.mean, mean, transition.spread if weights is None else weights)
        if batch.held is not None:
            held = batch.held[:, 0]
            options["kl_weights"] = held_weights(held, self.all_gather(held))
        if batch.process is not None:
            return self.loss(log_prob, batch.log_prob, batch.advantage, batch.process, kl)
        if (rule := self.rules.get("ratio")) is not None:
            # Means over the batch of all ranks, so that the rule is the same for any number of ranks.
            every = self.all_gather(torch.stack([transition.spread, transition.std / transition.spread]))
            drift = StepDrift.between(transition.mean, batch.old_mean, transition.std, transition.spread, every)

            def objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, ...]:
                found = rule.objective(log_ratio.flatten(), advantage.flatten(), clip_range, drift)  # one step a state
                return tuple(part.view_as(log_ratio) for part in found)

            options["objective"] = objective
        return self.loss(log_prob, batch.log_prob, batch.advantage, kl, **options)


class StepwiseGRPOModule(GRPOModule):
    """Step-wise GRPO: K candidate next states per state, with advantages from the rewards of these candidates.

    The reward scores noisy states, so that each step has its own advantage (LPO's GRPO form, arXiv:2502.01051;
    Step-GRPO of DRM, arXiv:2605.25661). States whose candidates all score equally are left out.

    Args:
        reward: Source of a reward that scores noisy states.
        candidates: Number of candidates K, timestep window, and the candidate with which a rollout goes on.
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
        if loss is not None and loss.takes_process:
            raise InputError("loss: StepwiseGRPOModule has one advantage of a step; take ClippedPolicyLoss")
        sampling, candidates = (sampling or Sampling()).with_noise(), candidates or Branching()
        candidates.training_steps(sampling.sampler(policy.resolve_family()))  # before weights are loaded
        super().__init__(policy, reward, sampling, loss, **options)
        self.candidates = candidates

    def make_experience(self, prompts: PromptBatch) -> StepSamples | None:
        samples, timesteps, scores = [], [], []
        for step in self.candidate_steps(prompts):
            timesteps.append(step.timestep)
            scores.append(step.scores.float().cpu())
            sampled = StepSamples(
                keys=tuple(f"{key}/{step.index}" for key in prompts.keys),
                prompts=prompts.prompts,
                latents=step.latents,
                timesteps=torch.full((len(prompts),), step.timestep),
                next_latents=step.candidates.transpose(0, 1),
                log_prob=step.log_prob.T,
                advantage=group_advantages(step.scores).T,
            )
            samples.append(sampled.to("cpu"))
        self.rollout_statistics = group_statistics(torch.tensor(timesteps), torch.stack(scores))
        return worth_learning(samples)


class TrajectoryGRPOModule(GRPOModule):
    """GRPO on whole trajectories: every step gets the advantage of its finished image among the K of its prompt.

    Flow matching follows Flow-GRPO (arXiv:2505.05470). DDPM's noise process uses DDIM steps, as DDPO
    (arXiv:2305.13301) does.

    Args:
        reward: Source of a reward that scores finished latents.
        num_trajectories: Trajectories K per prompt.
        low: Lowest timestep of the steps that are trained on; others are sampled alone.
        high: Highest timestep of these steps.
        reward_sigmas: Noise levels at which a latent reward scores; without effect on rewards of pixels.
        loss: See :class:`GRPOModule`. :class:`~latentreward.alignment.OutcomeProcessLoss` takes the advantages of the
            finished sample and of ``credit`` as two terms.
        reward_guidance: Guidance of the rollouts by the reward's gradient (Euphonium, arXiv:2602.04928).
        advantage: Rule that turns rewards into advantages; None is a :class:`~latentreward.alignment.GroupAdvantage`
            that divides by the spread of all rewards of a rollout, over all ranks (Flow-GRPO's setting).
        credit: Rule that gives each step a reward of its own, from the reward of each state at the state's own noise
            level, and of the finished latents at the least of ``reward_sigmas``. None gives every step the reward of
            its finished image.
        window: Rule that chooses the steps with noise of each rollout; the others are not trained on.
        trust_region: Rule, or a list of rules, that keeps the policy near the one that sampled, or near the reference.
        prompts_at_once: Prompts of a rollout that are sampled at once, to bound memory; None takes all.
        pruning: How many candidates of a prompt are sampled, of which a latent reward picks those that are finished.
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
        loss: ClippedPolicyLoss | None = None,
        reward_guidance: RewardGuidance | None = None,
        advantage: Advantage | None = None,
        credit: Credit | None = None,
        window: Window | None = None,
        trust_region: TrustRegion | list[TrustRegion] | None = None,
        prompts_at_once: int | None = None,
        pruning: Pruning | None = None,
        **options: Any,
    ) -> None:
        check_at_least_one(prompts_at_once=prompts_at_once)
        check_sigmas(reward_sigmas)
        loss = loss or ClippedPolicyLoss()
        check_range("[2, inf)", "one leaves nothing to compare", num_trajectories=num_trajectories)
        if loss.takes_process and credit is None:
            raise InputError("loss: OutcomeProcessLoss takes the rewards of the steps too; set credit: StateCredit")
        if advantage is not None and advantage.takes_parts and credit is not None:
            name = type(advantage).__name__
            raise InputError(f"advantage: {name} takes each reward of a mixture, unlike credit; leave one of them out")
        if window is not None and reward_guidance is not None:
            raise InputError("window and reward_guidance both choose steps of a rollout; leave one of them out")
        cps = sampling is not None and sampling.flow_noise == "cps" and policy.resolve_family().flow
        used_with = loss, reward, not cps
        rules = check_rules([trust_region] if isinstance(trust_region, TrustRegion) else trust_region or [], *used_with)
        if advantage is not None:
            advantage.check(len(reward.part_weights))
        if pruning is not None:
            pruning.check("num_trajectories", num_trajectories, (sampling or Sampling()).num_inference_steps, reward)
            by_group = advantage is None or not (advantage.takes_parts or advantage.takes_features)
            fits = {"credit": not credit, "reward_guidance": not reward_guidance, "advantage": by_group}
            fits["trust_region"] = "gate" not in rules
            if others := [name for name, fitting in fits.items() if not fitting]:
                raise InputError(f"pruning takes one reward of a sample, and {others[0]} looks at more; leave one out")
        sampling = (sampling or Sampling()).with_noise()
        sampler = sampling.sampler(policy.resolve_family())
        steps = Branching(num_trajectories, low, high).training_steps(sampler)  # before weights are loaded
        if window is not None:
            window.check(len(steps))
        if reward_guidance is not None:
            reward.require_guidance()
            reward_guidance.check(sampler)
        if credit is not None:
            check_states_reward("credit", reward)
        super().__init__(policy, reward, sampling, loss, **options)
        self.gate: Any = rules.get("gate")
        self.num_trajectories, self.reward_sigmas = num_trajectories, tuple(reward_sigmas)
        self.prompts_at_once, self.rules = prompts_at_once, rules
        self.rollout = FinishedSamples(num_trajectories, pruning)
        self.reward_guidance, self.credit, self.window = reward_guidance, credit, window
        self.advantage = (advantage or GroupAdvantage("all")).weighing(reward.part_weights)
        self.part_signs = [-1.0 if weight < 0 else 1.0 for weight in reward.part_weights]
        self.trained_steps = steps
        if window is not None:
            self.plain_sampler = replace(self.sampling, eta=0.0, noise_level=0.0).sampler(self.policy.family)
        if reward_guidance is not None:
            require_gradient(self.reward)

    def optional_fields(self) -> set[str]:
        given = {"process": self.loss.takes_process, "old_mean": "ratio" in self.rules, "held": self.gate is not None}
        return {name for name, there in given.items() if there}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.gate is not None and (state := self.gate.state()):
            checkpoint[GATE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.gate is not None and GATE in checkpoint:
            self.gate.restore(checkpoint[GATE])

    def make_experience(self, prompts: PromptBatch) -> StepSamples | None:
        sampler, steps = self.sampler, self.trained_steps
        if self.window is not None:
            # All ranks draw the same window: the seed is the run's, and the optimiser step is equal on all.
            iteration = self.trainer.global_step
            start = self.window.start(len(steps), iteration, pair_generator(self.seed, "window", iteration, ""))
            steps = steps[start : start + self.window.size]
            sampler = WindowedSampler(self.sampler, self.plain_sampler, steps)
        self.rollout.begin()
        sampled, pending = [], []
        for part in prompts.split(self.prompts_at_once):
            guided = sampler
            if self.reward_guidance is not None:
                encoded = self.reward.encode_prompts(part.times(self.num_trajectories).prompts)
                guided = GuidedSampler(sampler, self.reward_guidance, self.reward, encoded)
            sampled.append(self.rollout.sample(self, part, guided, "means" if "ratio" in self.rules else "states"))
            # A reward on a server scores these samples while the next are drawn.
            pending.append(begin_finished(self.reward, sampled[-1].finished, part, self.seed, self.reward_sigmas))
        trajectories, repeated = Trajectories.join(sampled), self.rollout.samples
        latents = trajectories.finished
        parts = torch.cat([wait() for wait in pending])
        rewards = self.reward.mix(parts, rows_of(prompts, latents)).view(len(prompts), self.num_trajectories)
        self.rollout.rewards = rewards.cpu()
        parts = parts.unflatten(0, rewards.shape)  # (P, K, R), scores of the R rewards of a mixture
        self.rollout_statistics = group_statistics(torch.zeros(1), rewards.T[None].cpu())
        features = None
        if self.advantage.takes_features:  # averages over 4 x 4 areas of each frame
            areas = F.adaptive_avg_pool2d(latents.float().flatten(1, -3), 4)
            features = areas.flatten(1).unflatten(0, rewards.shape)
        given = parts if self.advantage.takes_parts else rewards
        outcome = self.rollout.advantages(self, given, self.advantage, features)
        outcome = outcome[..., None].expand(*rewards.shape, len(steps))
        process = None
        if self.credit is not None:
            states = self._state_rewards(trajectories, prompts, steps[0]).unflatten(0, rewards.shape)
            # TurningPointCredit balances bonuses among the samples of all ranks.
            every = self.of_all_ranks(states)
            credit = self.credit.of_steps(every.flatten(0, 1), [step - steps[0] for step in steps])
            process = self.advantages(
                self.of_this_rank(credit.unflatten(0, every.shape[:2]), len(prompts)), self.advantage, features
            )
        # Plain GRPO has one advantage of a step: credit takes the place of the finished sample's.
        if process is not None and not self.loss.takes_process:
            outcome, process = process, None
        per_step = {"advantage": outcome, "process": process, "held": self._held(rewards, parts, len(steps))}
        rows = {name: value.flatten(0, 1).cpu() for name, value in per_step.items() if value is not None}
        samples = []
        for column, index in enumerate(steps):
            sample = StepSamples(
                keys=tuple(f"{key}/{index}" for key in repeated.keys),
                prompts=repeated.prompts,
                latents=trajectories.latents[index],
                timesteps=trajectories.timesteps[index].expand(len(repeated)),
                next_latents=trajectories.latents[index + 1][:, None],
                log_prob=trajectories.log_prob[index][:, None],
                old_mean=None if trajectories.means is None else trajectories.means[index],
                **{name: value[:, [column]] for name, value in rows.items()},
            )
            samples.append(sample.to("cpu"))
        return worth_learning(samples)

    def _state_rewards(self, trajectories: Trajectories, prompts: PromptBatch, first: int) -> Tensor:
        """Score the states from step ``first`` on, at their own noise levels: ``(P·K, S + 1)``, finished ones last."""
        encoded, rows = self.reward.encode_prompts(prompts.prompts), rows_of(prompts, trajectories.finished)
        timesteps = trajectories.timesteps.tolist()
        scores = [
            score_states(self.reward, encoded, trajectories.latents[index], rows, timesteps[index])
            for index in range(first, len(timesteps))
        ]
        # Finished latents have no noise level of their own; a latent reward noises them to the least one.
        sigmas = [min(self.reward_sigmas)]
        finished = score_finished(self.reward, trajectories.finished, prompts, self.seed, sigmas)
        return torch.stack([*scores, finished], dim=1)

    def _held(self, rewards: Tensor, parts: Tensor, steps: int) -> Tensor | None:
        """Tell on which steps ``(P, K, S)`` the KL term acts; None for all."""
        if self.gate is None:
            return None
        values = rewards
        if self.gate.takes == "parts":
            # A gate compares ranks; a reward with a negative weight is better the lower it is.
            values = parts * torch.tensor(self.part_signs, device=parts.device)
        every = self.of_all_ranks(values)
        return self.of_this_rank(self.gate.opens(every), len(values))[..., None].expand(-1, -1, steps)


def worth_learning(samples: Sequence[StepSamples]) -> StepSamples | None:
    """Return the rows with an advantage above :data:`LEAST_ADVANTAGE`; None if there are none."""
    joined = join_rows(samples)
    learned = [part.abs() > LEAST_ADVANTAGE for part in (joined.advantage, joined.process) if part is not None]
    rows = torch.cat(learned, dim=1).any(dim=1).nonzero().flatten().tolist()
    return take_rows(joined, rows) if rows else None


def group_statistics(timesteps: Tensor, scores: Tensor) -> RolloutStatistics:
    """Compute gaps and kept groups from scores ``(S, K, P)`` of K candidates; a group of equal scores is not kept."""
    gap = ((scores.amax(dim=1) - scores.amin(dim=1)) / 2).tanh()
    return RolloutStatistics(timesteps, scores, gap, gap > 0)
