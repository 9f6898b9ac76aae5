"""Plan of halving: one small pool of whole trajectories is recorded, and all schedules are replayed on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentreward.alignment import Halving, Reward, RolloutDraws, rows_of, sample_pruned, score_finished, score_states
from latentreward.alignment.rollout.halving import best
from latentreward.alignment.rollout.trajectories import PromptedPolicy
from latentreward.apps.generation.search import Sampler
from latentreward.core.bootstrap import Interval, clustered_mean
from latentreward.core.contracts import PromptBatch
from latentreward.core.storage.durable import write_file

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of candidates that schedules begin with and keep."""
MOST_CUTS = 2
"""Largest number of cuts of a schedule that is tried."""


@dataclass(frozen=True)
class Pool:
    """Scores of N trajectories of each of P prompts, and the seconds that each part of sampling takes for one row."""

    scores: dict[int, Tensor]  # finished steps → ``(P, N)`` scores of the states
    ends: Tensor  # ``(P, N)`` scores of the finished samples
    steps: int
    seconds_pass: float
    seconds_score: float
    seconds_end: float

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        sampler: Sampler,
        rewards: Sequence[Reward],
        prompts: PromptBatch,
        candidates: int,
        after: Sequence[int],
        sigmas: Sequence[float],
    ) -> Pool:
        """Sample all candidates of each prompt to the end, score their states by the last of ``rewards``."""
        policy, sampling = sampler.policy, sampler.sampling
        steps, scores, ends = sampling.sampler(policy.family), {step: list[Tensor]() for step in after}, list[Tensor]()
        spent = {"pass": 0.0, "score": 0.0, "end": 0.0}
        for place in range(len(prompts)):
            one = prompts.select([place])
            names, clock = one.times(candidates), time.perf_counter()
            network = PromptedPolicy.of(policy, names, sampler.guidance_scale, sampler.batch_size)
            taken, _ = sample_pruned(network, steps, sampling, RolloutDraws(sampler.seed, names.keys), {})
            rows = rows_of(one, taken.finished).cpu()
            clock = lap(spent, "pass", clock)
            encoded = rewards[-1].encode_prompts(one.prompts)
            for step in after:
                timestep = taken.timesteps[step].item()
                scores[step].append(score_states(rewards[-1], encoded, taken.latents[step], rows, timestep).cpu())
            clock = lap(spent, "score", clock)
            ends.append(score_finished(rewards[0], taken.finished, one, sampler.seed, sigmas).cpu())
            lap(spent, "end", clock)
        number = len(prompts) * candidates
        each = spent["pass"] / number / len(steps), spent["score"] / number / len(after), spent["end"] / number
        return cls({step: torch.stack(some) for step, some in scores.items()}, torch.stack(ends), len(steps), *each)

    def seconds(self, schedule: Halving) -> float:
        """Return the seconds of a picture by ``schedule``."""
        left, done, total = schedule.candidates, 0, 0.0
        for after, count in sorted(schedule.keep.items()):
            total += left * ((after - done) * self.seconds_pass + self.seconds_score)
            left, done = count, after
        return total + left * ((self.steps - done) * self.seconds_pass + (left > 1) * self.seconds_end)

    def replay(self, schedule: Halving) -> Tensor:
        """Return the score ``(P,)`` of what a schedule ends with, mean over all disjoint draws of the pool."""
        number, found = schedule.candidates, []
        for start in range(0, self.ends.shape[1] - number + 1, number):
            left = torch.arange(start, start + number).expand(len(self.ends), -1)
            for after, count in sorted(schedule.keep.items()):
                left = left.gather(1, best(count, self.scores[after].gather(1, left)))
            found.append(self.ends.gather(1, left).amax(dim=1))
        return torch.stack(found).mean(dim=0)

    def schedules(self) -> Iterator[Halving]:
        """Yield the schedules that are tried, best of N among them."""
        for number in (count for count in COUNTS if count <= self.ends.shape[1]):
            yield Halving(number, {})
            for cuts in range(1, MOST_CUTS + 1):
                for steps in combinations(self.scores, cuts):
                    for kept in product(COUNTS, repeat=cuts):
                        if all(a > b for a, b in zip((number, *kept), kept, strict=False)):
                            yield Halving(number, dict(zip(steps, kept, strict=True)))


@dataclass(frozen=True)
class Planned:
    """A schedule with what the pool says of it."""

    schedule: Halving
    samples: float  # time in that of one sample
    score: Interval  # of the pictures, over prompts
    gain: Interval  # above best of N at equal time
    chosen: bool  # none was better in less time, on the prompts that choose


def lap(spent: dict[str, float], name: str, since: float) -> float:
    """Add the seconds since ``since`` to ``spent``, and return the time."""
    now = time.perf_counter()
    spent[name] += now - since
    return now


def frontier(pool: Pool) -> list[Planned]:
    """Choose on every second prompt the schedules that none beats in less time; measure them on the other prompts."""
    every = [*pool.schedules()]
    one = pool.seconds(Halving(1, {}))
    times = torch.tensor([pool.seconds(schedule) for schedule in every], dtype=torch.float64)
    values = torch.stack([pool.replay(schedule) for schedule in every])
    chosen, highest = list[int](), -torch.inf
    for row in times.argsort(stable=True).tolist():
        if (mean := values[row, ::2].mean().item()) > highest:
            chosen, highest = [*chosen, row], mean
    plain = sorted((times[row].item(), row) for row, schedule in enumerate(every) if not schedule.keep)
    reach, judged = [at for at, _ in plain], values[:, 1::2].double().numpy()
    bests = judged[[row for _, row in plain]]
    groups = np.arange(judged.shape[1])

    def planned(row: int) -> Planned:
        at = times[row].item()
        equal = np.array([np.interp(at, reach, column) for column in bests.T])
        gain = clustered_mean(judged[row] - equal, groups)
        return Planned(every[row], at / one, clustered_mean(judged[row], groups), gain, row in chosen)

    return [planned(row) for row in dict.fromkeys([*chosen, *(row for _, row in plain)])]


def draw_frontier(found: Sequence[Planned], path: Path) -> None:
    """Draw scores against time, best of N beside halving, as a PNG."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    for label, some in (
        ("best of N", [one for one in found if not one.schedule.keep]),
        ("halving", [one for one in found if one.schedule.keep]),
    ):
        ordered = sorted(some, key=lambda one: one.samples)
        spread = np.array([[one.score.value - one.score.low, one.score.high - one.score.value] for one in ordered]).T
        at, values = [one.samples for one in ordered], [one.score.value for one in ordered]
        axes.errorbar(at, values, spread if ordered else None, marker="o", capsize=2, label=label)
    axes.set(xscale="log", xlabel="time, in samples", ylabel="score by the reward (95 % over prompts)")
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_file(path, buffer.getvalue())
