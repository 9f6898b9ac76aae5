"""Samples of a module that learns from finished samples, perhaps pruned: sampling, advantages, and what they cost."""

import torch
from torch import Tensor

from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.rewards.base import rows_of, score_states
from latentreward.alignment.rollout.advantages import Advantage
from latentreward.alignment.rollout.pruning import Agreement, BestAndWorst, Pruning, scaled_advantages
from latentreward.alignment.rollout.samplers import StepSampler
from latentreward.alignment.rollout.trajectories import Trajectories, sample_pruned, sample_trajectories
from latentreward.core.contracts import PromptBatch
from latentreward.core.running import pair_generator


class FinishedSamples:
    """Samples of a module's rollout that are sampled to the end; with ``pruning`` ρ is measured in each, and logged."""

    def __init__(self, count: int, levels: int, pruning: Pruning | None) -> None:
        self.count = count  # samples K of a prompt that are finished
        self.levels = levels  # passes of the reward on a finished sample
        self.pruning = pruning
        self.begin()

    def begin(self) -> None:
        """Begin a rollout."""
        self.prompts = PromptBatch((), ())  # those of this rank whose samples were finished
        self.samples = PromptBatch((), ())  # `count` rows for each of them, with the candidates' own keys
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def sample(
        self, module: AlignmentModule, prompts: PromptBatch, sampler: StepSampler, keep_means: bool = False
    ) -> tuple[Trajectories, PromptBatch]:
        """Sample a batch of prompts; also return the prompts of which K samples were finished."""
        settings = (module.sampling, module.guidance_scale, module.seed)
        if (pruning := self.pruning) is None:
            names = prompts.times(self.count)
            self.prompts, self.samples = self.prompts + prompts, self.samples + names
            return sample_trajectories(module.policy, sampler, names, *settings, keep_means=keep_means), prompts
        names, encoded = prompts.times(pruning.candidates), module.reward.encode_prompts(prompts.prompts)

        def choose(states: Tensor, timestep: float) -> Tensor:
            scores = score_states(module.reward, encoded, states, rows_of(prompts, states), timestep)
            module.reward.take_means()  # those of a mixture's rewards are logged, and noisy states have none
            predicted, rule = scores.view(len(prompts), -1).cpu(), pruning.rule or BestAndWorst()
            drawn = [pair_generator(module.seed, "pruning", 0, key) for key in prompts.keys]
            choices = [rule.choose(one, self.count, own) for one, own in zip(predicted, drawn, strict=True)]
            kept, there = torch.stack(choices).sort(dim=1).values, torch.ones(len(prompts), dtype=torch.bool)
            if pruning.min_spread:
                spread = predicted.std(dim=1, correction=0)
                # One goes on in any case: under FSDP2 all ranks must call the network equally often.
                there = (spread >= pruning.min_spread) | (torch.arange(len(spread)) == spread.argmax())
            self._batches.append((predicted, kept, there))
            rows = kept + pruning.candidates * torch.arange(len(prompts))[:, None]
            return rows[there].flatten()

        prune = pruning.after_steps, choose
        taken, rows = sample_pruned(module.policy, sampler, names, *settings, prune=prune, keep_means=keep_means)
        finished = prompts.select(self._batches[-1][2].nonzero().flatten().tolist())
        self.prompts, self.samples = self.prompts + finished, self.samples + names.select(rows.tolist())
        return taken, finished

    def advantages(
        self, module: AlignmentModule, rewards: Tensor, rule: Advantage, features: Tensor | None = None
    ) -> Tensor:
        """Compute the advantages ``(P', K)`` of this rank's ``samples`` from their rewards; leave values to log.

        All ranks call this at once; see :meth:`AlignmentModule.advantages` and :func:`scaled_advantages`.
        """
        if self.pruning is None:
            return module.advantages(rewards, rule, features)
        predicted, kept, there = (torch.cat(parts).to(rewards.device) for parts in zip(*self._batches, strict=True))
        own = rewards.new_zeros(len(there), self.count)  # of equal size on all ranks, which may have left out prompts
        own[there] = rewards
        everywhere = module.of_all_ranks(there)
        found, indices, values = (module.of_all_ranks(one)[everywhere] for one in (predicted, kept, own))
        self.agreement = agreement = Agreement.of(found, indices, values)
        every = rewards.new_zeros(len(everywhere), self.count)
        pruned = self.pruning.candidates > self.count  # else C is 1, but for rounding
        every[everywhere] = scaled_advantages(rule, values, agreement.contrast if pruned else None)
        steps, early = module.sampling.num_inference_steps, self.pruning.after_steps
        finished = len(values) / len(everywhere) * self.count / self.pruning.candidates
        family = module.policy.family
        guided = family.passes if family.needs_uncond(module.guidance_scale) else 1
        module.rollout_values = {
            "prediction_correlation": agreement.correlation.item(),
            "finished_share": finished,
            "policy_passes": guided * (early / finished + steps - early),
            "reward_passes": 1 / finished + self.levels,
        }
        return module.of_this_rank(every, len(there))[there]
