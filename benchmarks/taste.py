"""Measure what own pairs of the tiny world teach, and an evening from ratings to an aligned generator; by hand.

    python benchmarks/taste.py accuracy [--pairs 50 100 200 500] [--seeds 3] [--tunings frozen lora full]
    python benchmarks/taste.py evening [--pairs 100] [--seeds 1]

``accuracy`` draws pairs with noisy labels, as the tiny world's data sets have them, runs ``latentreward taste`` on each
folder, and prints two accuracies: of the command's own held-out pairs, with its interval, and of 500 other pairs whose
utilities differ by more than 0.3, ordered as the utility orders them.

``evening`` draws a few pictures for each caption, rates pairs in the order of the page, with the tiny world's noisy
labels as the rater's taste, and runs ``latentreward taste --align`` from there; and once more with random numbers as
the alignment's reward. It prints the seconds of the whole way, the accuracy with its interval, and the judge's utility
of pictures of 192 captions that nothing was trained on: before, after, and after the alignment with random numbers.

The commands run with one thread; a cell that is done is not run again. Tables are printed as Markdown, for
docs/measurements.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from measuring import table
from PIL import Image

from latentreward.apps.taste.plan import BEST
from latentreward.apps.taste.ratings import Ratings
from latentreward.apps.taste.results import JSON
from latentreward.core.bootstrap import Interval, bootstrap_interval
from latentreward.core.reports.tables import with_interval
from latentreward.reward import RewardModel
from latentreward.tinyworld.captions import draw_caption
from latentreward.tinyworld.pairs import Pair, draw_pairs, encode_jpeg
from latentreward.tinyworld.sampling import judge_policy
from latentreward.tinyworld.scenes import draw_label, draw_scene, render, scene_utility

BASE = "sd_tiny"
GAP = 0.3
JUDGED_PAIRS = 500
PICTURES_PER_CAPTION = 4
RANDOM = "--align_settings=[--model.reward=RandomReward, --model.reward.seed=0]"
SECONDS = "seconds.txt"


def write_pairs(folder: Path, number: int, seed: int) -> None:
    """Write drawn pairs as ``chosen/`` and ``rejected/``, with captions."""
    for place, pair in enumerate(draw_pairs("train", number, np.random.default_rng(seed), ties=False)):
        won, lost = (pair.first, pair.second) if pair.label == 1 else (pair.second, pair.first)
        for side, picture in (("chosen", won), ("rejected", lost)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            (folder / side / f"{place:04}.jpg").write_bytes(picture.jpeg)
        (folder / "chosen" / f"{place:04}.txt").write_text(pair.caption)


def write_ratings(folder: Path, number: int, seed: int) -> None:
    """Write pictures of several captions, and rate so many pairs of them as the page would show them."""
    rng, utilities = np.random.default_rng(seed), {}
    pairs_per_caption = PICTURES_PER_CAPTION * (PICTURES_PER_CAPTION - 1) // 2
    folder.mkdir(parents=True)
    for place in range(-(-number // pairs_per_caption)):
        caption = draw_caption(rng, "train")
        for picture in range(PICTURES_PER_CAPTION):
            scene, file = draw_scene(caption, rng), folder / f"{place:03}_{picture}.jpg"
            file.write_bytes(encode_jpeg(render(scene)))
            file.with_suffix(".txt").write_text(caption.text)
            utilities[file.name] = scene_utility(caption, scene)
    ratings = Ratings(folder, seed)
    for _ in range(number):
        pair = ratings.next
        if pair is None:
            break
        label = draw_label(utilities[pair.a.path], utilities[pair.b.path], rng)
        ratings.rate(pair.names, {1.0: "a", 0.0: "b"}.get(label, "tie"))


def taste(folder: Path, work: Path, seed: int, *options: str) -> float:
    """Run the command, and return its seconds by the clock; those of the first time if it was done before."""
    if (work / SECONDS).is_file():
        return float((work / SECONDS).read_text())
    command = [sys.executable, "-m", "latentreward", "taste", str(folder), f"--base={BASE}", f"--seed={seed}"]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([*command, "--device=cpu", f"--work={work}", *options], check=True, env=environment)
    seconds = time.perf_counter() - began
    (work / SECONDS).write_text(f"{seconds:.1f}")
    return seconds


def told(work: Path) -> tuple[int, Interval]:
    """Return the number of held-out pairs, and the accuracy on them, from the command's result."""
    content = json.loads((work / JSON).read_text())
    return content["held_out"], Interval(
        *(content["accuracy"][name] for name in ("value", "low", "high", "independent_pairs"))
    )


def judged_pairs() -> list[Pair]:
    """Draw pairs that differ clearly, of captions that no folder has."""
    drawn = draw_pairs("test", 3 * JUDGED_PAIRS, np.random.default_rng(99))
    return [pair for pair in drawn if abs(pair.first.utility - pair.second.utility) > GAP][:JUDGED_PAIRS]


@torch.inference_mode()
def accuracy_on(checkpoint: Path, pairs: Sequence[Pair]) -> float:
    """Return the share of pairs whose scores are in the order of their utilities."""
    reward = RewardModel.from_pretrained(str(checkpoint))
    pictures = [Image.open(BytesIO(one.jpeg)) for pair in pairs for one in (pair.first, pair.second)]
    scores = reward.score([pair.caption for pair in pairs for _ in range(2)], pictures).reshape(-1, 2)
    better = torch.tensor([pair.first.utility > pair.second.utility for pair in pairs])
    return float(((scores[:, 0] > scores[:, 1]) == better).float().mean())


def accuracy(options: argparse.Namespace) -> None:
    """Print a row for each number of pairs and tuning."""
    pairs, rows = judged_pairs(), []
    for number in options.pairs:
        for tuning in options.tunings:
            own, others, seconds = [], [], []
            for seed in range(options.seeds):
                folder = options.work / f"pairs_{number}_{seed}"
                if not folder.exists():
                    write_pairs(folder, number, seed)
                work = options.work / f"{tuning}_{number}_{seed}"
                seconds.append(taste(folder, work, seed, f"--tuning={tuning}"))
                own.append(with_interval(told(work)[1]._replace(groups=None)))
                (checkpoint,) = work.glob(f"train-*/out/{BEST}")
                others.append(accuracy_on(checkpoint, pairs))
            mean = f"{100 * np.mean(others):.1f} ({', '.join(f'{100 * value:.1f}' for value in others)})"
            rows.append([number, tuning, "; ".join(own), mean, f"{np.median(seconds):.0f}"])
    names = ("pairs", "tuning", "held-out accuracy in %, each seed", f"on {len(pairs)} other pairs", "s")
    table("Own taste in the tiny world", names, rows)


def evening(options: argparse.Namespace) -> None:
    """Print a row for each number of rated pairs and seed."""
    before, rows = judge_policy(BASE, None, 1.0), []
    for number in options.pairs:
        for seed in range(options.seeds):
            folder = options.work / f"ratings_{number}_{seed}"
            if not folder.exists():
                write_ratings(folder, number, seed)
            works = {name: options.work / f"evening_{name}_{number}_{seed}" for name in ("own", "random")}
            always = ("--align", "--align_always=true")
            seconds = taste(folder, works["own"], seed, *always)
            taste(folder, works["random"], seed, *always, RANDOM)
            changes = []
            for work in works.values():
                (lora,) = work.glob("align-*/out/lora")
                after = judge_policy(BASE, lora, 1.0)
                change, low, high, _ = bootstrap_interval([after.utility - before.utility])
                changes.append(f"{after.utility.mean():.3f}, {change:+.3f} [{low:+.3f}, {high:+.3f}]")
            held, own = told(works["own"])
            shown = f"{with_interval(own._replace(groups=None))} of {held}"
            rows.append([number, seed, f"{seconds:.0f}", shown, f"{before.utility.mean():.3f}", *changes])
    names = ("rated pairs", "seed", "s", "held-out accuracy in %", "utility before", "after", "after random numbers")
    table("An evening in the tiny world", names, rows)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "evening"))
    parser.add_argument("--pairs", type=int, nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--tunings", nargs="+", default=["frozen", "lora", "full"])
    parser.add_argument("--work", type=Path, default=Path("runs/taste_benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    defaults = {"accuracy": ([50, 100, 200, 500], 3), "evening": ([100], 1)}[options.what]
    options.pairs, options.seeds = options.pairs or defaults[0], options.seeds or defaults[1]
    (accuracy if options.what == "accuracy" else evening)(options)


if __name__ == "__main__":
    main()
