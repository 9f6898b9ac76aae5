"""Measure the seconds until alignment reaches a utility: released NFT, flow_grpo and LeapAlign beside this project's.

    python benchmarks/released_utility.py [--reward dina_lrm_tiny] [--released DIR] [--seconds 40] [--seeds 3] [--quick]

DIR holds clones of github.com/NVlabs/DiffusionNFT, yifan123/flow_grpo and RuoyuWang-2077/FlowBP. Without DIR only this
project's side is measured. All arms train equal LoRA of the shipped tiny SD3.5 by one DiNa-LRM (``--reward``, a
checkpoint or run; ``dina_lrm_tiny`` is trained first) on the same 1,024 captions, for the same processor time of one
thread, with rollouts and rewards, without start-up and judging. The tiny world's judge, which is never a reward, gives
the utility of held-out captions at some moments; between these it is interpolated. Seeds in which the released code
gains nothing are left out of the seconds to its utility. Ours have the settings of ``configs/align`` and the rates of
``reproduction/rows/flow_first.yaml``; the released code has its counterpart's.

What of the released code runs, and what stands in for the rest, is in ``released_trainings.py``.
"""

import argparse
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, ratio, table
from released_trainings import RELEASED
from search import in_chunks, utilities
from torch import Tensor, nn
from trained_rewards import trained_rewards

from latentreward.alignment import PolicySource, Sampling, sample_latents
from latentreward.core.public_names import import_all
from latentreward.diffusion import LoRA
from latentreward.tinyworld.captions import judged_captions

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "align"
OURS = {
    "RAM": ("ram_tiny", "--model.optimizer.lr=3e-3"),
    "DiffusionNFT": ("nft_tiny", "--model.optimizer.lr=1e-3"),
    "trajectory GRPO": ("grpo_trajectory_tiny", "--model.optimizer.lr=3e-3"),
    "ReFL to a state": (
        *("refl_state_tiny", "--model.optimizer.lr=9e-4", "--model.policy.source=sd35_tiny"),
        "--model.sampling={num_inference_steps: 20, noise_level: 0.0}",
    ),
}
"""Arm -> file of its settings, and what differs from the file."""
MOMENTS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Shares of the budget after which an adapter is judged."""

# --- judging -------------------------------------------------------------------------------------------------------


def adapter(network: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the weights of a network's adapter, by the names that they have in our policy."""
    weights = {key.removeprefix("base_model.model."): weight for key, weight in network.named_parameters()}
    return {key.replace(f".{name}.", ".policy."): weight for key, weight in weights.items() if f".{name}." in key}


class Judge:
    """Utility of an adapter: mean over held-out captions, of samples with 10 steps without guidance."""

    def __init__(self, captions: int) -> None:
        self.captions = judged_captions()[:captions]
        self.policy = PolicySource("sd35_tiny", lora=LoRA(8, 8)).load(0).eval()
        self.before = self({})

    def __call__(self, weights: dict[str, Tensor]) -> float:
        """Return the utility with these weights of the adapter."""
        for name, weight in weights.items():
            self.policy.network.get_parameter(name).data.copy_(weight)
        settings = {"guidance_scale": 1.0, "seed": 1}
        sample = partial(sample_latents, self.policy, sampling=Sampling(10, noise_level=0.0), **settings)
        return float(utilities(self.policy, in_chunks(sample, self.captions), self.captions).mean())


class Course:
    """Utilities of an adapter in the course of its training, which :meth:`begin` starts.

    Attributes:
        points: Pairs of seconds and utility: before, and after the first update past each moment.
        updates: Optimiser steps.
    """

    def __init__(self, judge: Judge, moments: Sequence[float], weights: Callable[[], dict[str, Tensor]]) -> None:
        self.judge, self.moments, self.weights = judge, moments, weights
        self.points, self.updates, self.began = [(0.0, judge.before)], 0, 0.0

    def begin(self) -> None:
        """Start the clock."""
        self.began = time.process_time()

    def update(self) -> bool:
        """Judge the adapter after an update if a moment has passed; tell whether the last one has."""
        now = time.process_time()
        self.updates += 1
        passed = sum(moment <= now - self.began for moment in self.moments) - len(self.points) + 1
        if passed:
            self.points += [(now - self.began, self.judge(self.weights()))] * passed
            self.began += time.process_time() - now
        return len(self.points) > len(self.moments)

    def seconds_to(self, utility: float) -> float:
        """Return when a utility above that before the training is reached first; infinite if it is not."""
        for (start, low), (end, high) in itertools.pairwise(self.points):
            if high >= utility:
                return start + (end - start) * (utility - low) / (high - low)
        return inf


# --- ours ----------------------------------------------------------------------------------------------------------


def configured(arm: str, reward: str, seed: int) -> Any:
    """Return the module and the data of an arm of ours, as ``model`` and ``data``."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule, LightningModule, seed_everything

    seed_everything(seed, verbose=False)
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_argument("--config", action="config")
    parser.add_argument("--trainer", type=dict)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_subclass_arguments(LightningModule, "model")
    config, *changes = OURS[arm]
    return parser.instantiate(
        parser.parse_args([f"--config={CONFIGS / config}.yaml", f"--model.reward.path={reward}", *changes])
    )


def train_ours(arm: str, reward: str, seed: int, judge: Judge, moments: Sequence[float]) -> Course:
    """Train an arm of ours; return its course."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    run = configured(arm, reward, seed)
    course = Course(judge, moments, lambda: adapter(run.model.policy.network, "policy"))

    def after_update(trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = course.update()

    follow = LambdaCallback(on_fit_start=lambda *_: course.begin(), on_train_batch_end=after_update)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "devices": 1, "gradient_clip_val": run.trainer["gradient_clip_val"]}
    Trainer(**settings, **quiet, max_epochs=-1, callbacks=[follow]).fit(run.model, run.data)
    return course


# --- released code -------------------------------------------------------------------------------------------------


class BudgetUsed(Exception):
    """End of a released training."""


def train_released(arm: str, root: Path, reward: str, seed: int, judge: Judge, moments: Sequence[float]) -> Course:
    """Train by released code; return the course."""
    counterpart, make = RELEASED[arm]
    train, theirs, optimizer = make(root, configured(counterpart, reward, seed))
    course = Course(judge, moments, lambda: adapter(theirs, "default"))

    def after_update(*_: Any) -> None:
        if course.update():
            raise BudgetUsed

    optimizer.register_step_post_hook(after_update)
    torch.manual_seed(seed)
    course.begin()
    with suppress(BudgetUsed):
        train()
    return course


# --- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds(Spread):
    """Seconds, or ratios of them, that are infinite where a utility was not reached."""

    def __str__(self) -> str:
        return super().__str__().replace("inf", "not reached")

    def entries(self) -> dict[str, Any]:
        """Return the entries for JSON, which has no infinity."""
        found = super().entries()
        middle, *ends = (None if value == inf else value for value in (found["median"], *found["range"]))
        return found | {"median": middle, "range": ends}


def compare(courses: dict[str, list[Course]], target: str, best: bool) -> Iterator[list[Any]]:
    """Yield a row for each arm: its seconds until a utility of a released arm, seed by seed.

    The utility is that at the end or, since a training can do harm in the long run, that of the ``best`` moment.
    """
    aims = [max(utility for _, utility in one.points) if best else one.points[-1][1] for one in courses[target]]
    gaining = [n for n, aim in enumerate(aims) if aim > courses[target][n].judge.before]
    first = [f"{target}, {'best moment' if best else 'end'}", Spread(aims), len(gaining)]
    for arm, found in courses.items():
        if not gaining:
            yield [*first, arm, "no gain to reach", ""]
            continue
        theirs, seconds = (
            Seconds([one[n].seconds_to(aims[n]) for n in gaining], ".1f") for one in (courses[target], found)
        )
        yield [*first, arm, seconds, Seconds(ratio(seconds, theirs).values)]


def main() -> None:
    """Train all arms, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="dina_lrm_tiny")
    parser.add_argument("--released", type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=40.0, help="processor time of each arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--quick", action="store_true", help="one seed, 2 s, 2 moments, 8 captions")
    options = parser.parse_args()
    seeds, captions, seconds, shares = options.seeds, options.captions, options.seconds, MOMENTS
    if options.quick:
        seeds, captions, seconds, shares = 1, 8, 2.0, (0.5, 1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    import_all()
    (reward,) = trained_rewards([options.reward])
    arms: dict[str, Callable[..., Course]] = {arm: partial(train_ours, arm) for arm in OURS}
    if options.released:
        arms |= {arm: partial(train_released, arm, options.released.resolve()) for arm in RELEASED}
    judge, moments = Judge(captions), [share * seconds for share in shares]
    courses: dict[str, list[Course]] = {arm: [] for arm in arms}
    for train in arms.values():  # imports and caches of the first update are start-up
        train(reward, 0, judge, [0.0])
    for seed in range(seeds):
        for arm, train in arms.items():
            courses[arm].append(train(reward, seed, judge, moments))
    columns = ("arm", "updates", "before", *(f"{moment:g} s" for moment in moments))
    rows = (
        [arm, Spread([float(one.updates) for one in found], ".0f")]
        + [Spread([one.points[place][1] for one in found]) for place in range(len(moments) + 1)]
        for arm, found in courses.items()
    )
    table(f"Utility in the course of training, {captions} captions, seeds: {seeds}, one thread", columns, rows)
    columns = ("released code", "utility", "seeds with a gain", "arm", "s to this utility", "ratio")
    for target in RELEASED if options.released else ():
        rows = (row for best in (False, True) for row in compare(courses, target, best))
        table(f"Seconds to the utility of {target}, and their ratio to its own", columns, rows)


if __name__ == "__main__":
    main()
