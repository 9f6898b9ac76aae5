"""Measure what reward heads cost: time and FLOPs of a pair, side by side.

    python benchmarks/heads.py [RUN ...] [--pairs 64] [--repeats 5]

Each ``RUN`` is the folder of a trained reward, for example those that the rows ``heads_sd`` and ``heads_sd35`` of
``python -m tools.reproduce`` leave below runs/reproduce. Without any, the shipped tiny recipes of the five heads on the
tiny Stable Diffusion are trained first, below runs/trained_rewards. Noisy latents of the tiny world's pictures and
their prompts are scored at one level, without the VAE, in one thread; the runs take turns. The first run is the one
that others are compared with.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from measuring import flops, interleaved, ratio, table
from trained_rewards import trained_rewards

from latentreward.reward import RewardModel, ScoringNoise
from latentreward.tinyworld.pairs import draw_pairs

RECIPES = ("lrm_tiny", "dina_lrm_unet_tiny", "pavrm_tiny", "drm_tiny", "layer_mix_tiny")


def describe(run: str) -> str:
    """Return the head's class and the backbone's name, from the run's settings."""
    settings = yaml.safe_load((Path(run) / "config.yaml").read_text())["model"]["init_args"]
    head, backbone = (settings[part]["class_path"].rpartition(".")[2] for part in ("head", "backbone"))
    return f"{head} on {backbone}"


@torch.no_grad()
def measure(runs: Sequence[str], pairs: int, repeats: int) -> None:
    """Print the table."""
    models = {f"{describe(run)} ({Path(run).parent.name})": RewardModel.from_pretrained(run) for run in runs}
    drawn = draw_pairs("test", pairs, np.random.default_rng(0))
    prompts = [pair.caption for pair in drawn for _ in range(2)]
    works = {}
    for name, model in models.items():
        space = model.backbone.latent_space
        latents = torch.randn(2 * pairs, *space.shape(32, 32), generator=torch.Generator().manual_seed(0))
        works[name] = partial(model.score_latents, prompts, latents, noise=ScoringNoise(sigmas=(0.5,)))
    times = interleaved(works, repeats)
    first = next(iter(times))
    rows = []
    for name, spread in times.items():
        cost = flops(works[name]) / pairs / 1e6
        rows.append([name, f"{1000 * spread.median / pairs:.2f}", ratio(spread, times[first]), f"{cost:.0f}"])
    table("Reward heads", ("head", "ms of processor time a pair", "against the first", "MFLOP a pair"), rows)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.runs or [str(Path(checkpoint).parent) for checkpoint in trained_rewards(RECIPES)]
    measure(runs, options.pairs, options.repeats)


if __name__ == "__main__":
    main()
