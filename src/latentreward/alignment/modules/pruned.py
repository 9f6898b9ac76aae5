"""Pruned rollouts of a module that learns from finished samples: sampling, advantages, and what they cost."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentreward.alignment.modules.alignment import AlignmentModule
from latentreward.alignment.rewards.base import rows_of, score_states
from latentreward.alignment.rollout.advantages import Advantage
from latentreward.alignment.rollout.pruning import Agreement, BestAndWorst, Pruning, scaled_advantages
from latentreward.alignment.rollout.samplers import StepSampler
from latentreward.alignment.rollout.trajectories import Trajectories, sample_pruned
from latentreward.core.contracts import PromptBatch
from latentreward.core.running import pair_generator

ENOUGH = 256
"""Degrees of freedom, K − 1 a prompt, from which on ρ is judged; its standard error is then at most 0.06."""


class PrunedRollouts:
    """Pruned rollouts of one module; ρ is measured over all its rollouts, and said once if it is too low.

    Args:
        pruning: Settings.
        count: Samples K of a prompt that are finished.
        levels: Passes of the reward on a finished sample.

    Attributes:
        prompts: Prompts of this rank whose samples were finished in this rollout.
        samples: The finished samples: ``count`` rows for each of ``prompts``, with the candidates' own keys.
    """

    def __init__(self, pruning: Pruning, count: int, levels: int) -> None:
        self.pruning, self.count, self.levels = pruning, count, levels
        self.prompts = self.samples = PromptBatch((), ())
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._total: Agreement | None = None
        self._told = False

    def begin(self, module: AlignmentModule, trained: float) -> None:
        """Begin a rollout; warn, once, if pruning did not pay in the rollouts before.

        ``trained`` is the number of the policy's passes in training on one sample; forward and backward count as 3.
        """
        self.prompts = self.samples = PromptBatch((), ())
        self._batches.clear()
        pruning, total, steps = self.pruning, self._total, module.sampling.num_inference_steps
        if self._told or pruning.candidates == self.count or total is None or total.sums[4] < ENOUGH:
            return
        found, needed = total.correlation.item(), total.least_correlation(pruning, self.count, steps, trained)
        if abs(found) <= needed:
            self._told = True
            rank_zero_warn(
                f"pruning: scores after step {pruning.after_steps} of {steps} correlate with rewards by only ρ = "
                f"{found:.2f} within prompts; "
                + (
                    f"with these settings pruning pays above {needed:.2f}: raise pruning.after_steps, lower "
                    "pruning.candidates, or leave pruning out and lower the number of samples"
                    if needed <= 1
                    else "with these candidates and this rule it pays at no ρ: leave pruning out"
                )
            )

    def sample(
        self, module: AlignmentModule, prompts: PromptBatch, sampler: StepSampler, keep_means: bool = False
    ) -> tuple[Trajectories, PromptBatch]:
        """Sample and score candidates of a batch of prompts, and finish those that are kept.

        Returns:
            Trajectories of K samples for each of the prompts that were not left out, and these prompts.
        """
        names, encoded = prompts.times(self.pruning.candidates), module.reward.encode_prompts(prompts.prompts)

        def choose(states: Tensor, timestep: float) -> Tensor:
            scores = score_states(module.reward, encoded, states, rows_of(prompts, states), timestep)
            module.reward.take_means()  # those of a mixture's rewards are logged, and noisy states have none
            predicted, rule = scores.view(len(prompts), -1).cpu(), self.pruning.rule or BestAndWorst()
            drawn = [pair_generator(module.seed, "pruning", 0, key) for key in prompts.keys]
            choices = [rule.choose(one, self.count, own) for one, own in zip(predicted, drawn, strict=True)]
            kept, there = torch.stack(choices).sort(dim=1).values, torch.ones(len(prompts), dtype=torch.bool)
            if self.pruning.min_spread:
                spread = predicted.std(dim=1, correction=0)
                # One goes on in any case: under FSDP2 all ranks must call the network equally often.
                there = (spread >= self.pruning.min_spread) | (torch.arange(len(spread)) == spread.argmax())
            self._batches.append((predicted, kept, there))
            rows = kept + self.pruning.candidates * torch.arange(len(prompts))[:, None]
            return rows[there].flatten()

        settings = (module.sampling, module.guidance_scale, module.seed, (self.pruning.after_steps, choose))
        taken, rows = sample_pruned(module.policy, sampler, names, *settings, keep_means)
        finished = prompts.select(self._batches[-1][2].nonzero().flatten().tolist())
        self.prompts, self.samples = self.prompts + finished, self.samples + names.select(rows.tolist())
        return taken, finished

    def advantages(self, module: AlignmentModule, rewards: Tensor, rule: Advantage) -> Tensor:
        """Compute the advantages ``(P', K)`` of this rank's finished samples; see :func:`scaled_advantages`.

        Values to log are left in :attr:`AlignmentModule.rollout_values`.

        Args:
            module: Module whose rollout it is; all ranks call this at once.
            rewards: ``(P', K)`` rewards of :attr:`samples`.
            rule: Rule that turns rewards into advantages.
        """
        predicted, kept, there = (torch.cat(parts).to(rewards.device) for parts in zip(*self._batches, strict=True))
        own = rewards.new_zeros(len(there), self.count)  # of equal size on all ranks, which may have left out prompts
        own[there] = rewards
        everywhere = module.of_all_ranks(there)
        found, indices, values = (module.of_all_ranks(one)[everywhere] for one in (predicted, kept, own))
        agreement = Agreement.of(found, indices, values)
        self._total = agreement if self._total is None else self._total + agreement
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
