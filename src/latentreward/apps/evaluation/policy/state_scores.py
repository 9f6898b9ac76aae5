"""Correlation of a reward's scores of noisy states with those of the finished samples, by step of the sampler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from latentreward.alignment import (
    RewardSource,
    Sampling,
    check_sigmas,
    rows_of,
    sample_trajectories,
    score_finished,
    score_states,
)
from latentreward.alignment.rollout.pruning import check_states_reward
from latentreward.apps.evaluation.policy.samples import JudgedPolicy, SamplingPlan
from latentreward.apps.generation.trained_policy import offload_text_encoders
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError, check_range
from latentreward.core.reports.tables import Row
from latentreward.core.shared_work import SharedWork, Task
from latentreward.data.alignment.prompt_files import PromptRow
from latentreward.reward.metrics.rank_correlation import clustered_correlation

STATES_OF = "states of {}"
"""Format of the name of the task that scores the states of a policy, from the name of the policy's folders."""


@dataclass
class StateScores:
    """Reward whose scores of noisy states are compared with its scores of the finished samples, for pruned rollouts.

    Attributes:
        reward: Reward that scores noisy states.
        score_sigmas: Noise levels in [0, 1] at which a latent reward scores finished samples.
        samples: Samples of each prompt, sampled at once; at least 2.
    """

    reward: RewardSource
    score_sigmas: Sequence[float] = (0.2,)
    samples: int = 8

    def __post_init__(self) -> None:
        check_sigmas(self.score_sigmas, "state_scores.score_sigmas")
        check_range("[2, inf)", "samples of one prompt are compared", **{"state_scores.samples": self.samples})


def check_states(sampling: Sampling, scores: StateScores | None, policies: Mapping[str, JudgedPolicy]) -> None:
    """Raise InputError, before any weight is loaded, if samples are clips, or there are no noisy states to score."""
    sampling.require_images("evaluate-policy")
    if scores is None:
        return
    if sampling.num_inference_steps < 2:
        raise InputError("state_scores: sampling.num_inference_steps=1 leaves no noisy state to score; raise it")
    for name, judged in policies.items():
        check_states_reward("state_scores", scores.reward)
        if judged.images is not None:
            raise InputError(f"state_scores: {name} is a folder of pictures, without noisy states; leave it out")
        scores.reward.require_latents_of(judged.trained.source())


def states_tasks(
    scores: StateScores | None, policies: Mapping[str, JudgedPolicy], slots: Sequence[str], plan: SamplingPlan
) -> dict[str, Task]:
    """Return the tasks that score states of policies, in order of the names of their folders; none without a reward."""
    pairs = () if scores is None else zip(slots, policies.values(), strict=False)
    return {STATES_OF.format(slot): partial(states_task, policy, plan, scores) for slot, policy in pairs}


def states_task(
    policy: JudgedPolicy, plan: SamplingPlan, scores: StateScores, shards: Sequence[list[Any]]
) -> Callable[[list[Any]], list[list[float]]]:
    """Load generator and reward, and return the function that scores all states of one prompt's samples.

    It takes [index of the prompt, prompt]; its result is ``(T, K)``: scores after each step, the finished ones last.
    The samples start from the noise of the pictures, unless those of all prompts share their noise.
    """
    generator = policy.trained.load(plan.device, plan.sampling)
    reward = scores.reward.load(generator).eval().to(plan.device)
    offload_text_encoders(generator, reward, [prompt for _, prompt in shards], plan.device)
    sampler = plan.sampling.sampler(generator.family)

    @torch.no_grad()
    def score(shard: list[Any]) -> list[list[float]]:
        named = PromptBatch((shard[1],), (str(shard[0]),))
        settings = (plan.sampling, plan.guidance_of(policy), plan.seed)
        drawn = sample_trajectories(generator, sampler, named.times(scores.samples), *settings)
        encoded, rows = reward.encode_prompts(named.prompts), rows_of(named, drawn.finished)
        states = zip(drawn.latents[1:-1], sampler.timesteps[1:].tolist(), strict=True)
        found = [score_states(reward, encoded, state, rows, timestep) for state, timestep in states]
        found.append(score_finished(reward, drawn.finished, named, plan.seed, scores.score_sigmas))
        return torch.stack(found).tolist()

    return score


def compare_states(
    scores: StateScores | None,
    policies: Mapping[str, JudgedPolicy],
    plan: SamplingPlan,
    rows: Sequence[PromptRow],
    slots: Sequence[str],
    work: SharedWork,
) -> list[Row]:
    """Score the states of samples of policies, by their names; return rows of ``PolicyReport.states``."""
    found, prompts = list[Row](), [row.prompt for row in rows]
    for slot, (name, judged) in zip(slots, () if scores is None else policies.items(), strict=False):
        done: list[tuple[list[Any], list[list[float]]]] = []
        work.run(STATES_OF.format(slot), [[*one] for one in enumerate(prompts)], done.extend)
        family = judged.trained.source().resolve_family()
        sigmas = family.noise_process.sigma(plan.sampling.sampler(family).timesteps[1:]).tolist()
        values = np.array([result for _, result in sorted(done, key=lambda one: one[0][0])])
        for step, (sigma, interval) in enumerate(zip(sigmas, within_prompts(values, prompts), strict=True), 1):
            found.append({"policy": name, "after_steps": step, "sigma": sigma, "correlation": interval})
    return found


def within_prompts(values: np.ndarray, prompts: Sequence[str]) -> list[Any]:
    """Correlate each but the last of the scores ``(P, T, K)`` with the last, within prompts, with intervals."""
    centred = values - values.mean(axis=2, keepdims=True)
    groups = np.repeat(np.array(prompts, dtype=object), values.shape[2])
    last = centred[:, -1].ravel()
    steps = range(values.shape[1] - 1)
    return [clustered_correlation(centred[:, step].ravel(), last, groups, "pearson") for step in steps]
