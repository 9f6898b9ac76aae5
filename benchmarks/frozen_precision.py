"""Measure what bfloat16 changes in the scores of frozen rewards, against float32; prints Markdown tables.

    python benchmarks/frozen_precision.py --reward PATH ... [--pairs 800] [--prompts 64]

Each ``--reward`` is a reward on a shipped tiny generator, given as for ``scoring.py``. ``set_precision`` is what
alignment uses under bf16-mixed, "autocast" what it would use otherwise. The first table ranks held-out pairs of drawn
pictures, whose images share their noise. The second is of rollouts by the policy of ``configs/align/lpo_tiny.yaml`` in
float32, which pass the same states whatever the reward's precision, because they go on with a random candidate.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import numpy as np
import torch
from measuring import table
from PIL import Image
from torch import Tensor
from trained_rewards import trained_rewards

from latentreward.alignment import (
    Branching,
    LatentReward,
    PolicySource,
    RolloutDraws,
    Sampling,
    SigmaThreshold,
    candidate_steps,
)
from latentreward.core.contracts import PromptBatch
from latentreward.diffusion import FlowMatching
from latentreward.reward import RewardModel
from latentreward.tinyworld.pairs import draw_pairs

BATCH = 100
SIGMAS = (0.05, 0.2, 0.5, 0.8)
TIMESTEPS = (1, 251, 501, 801)


def autocast() -> Any:
    """Return the context of ``precision: bf16-mixed``."""
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def gaps(path: str, count: int) -> tuple[list[str], dict[tuple[str, str], Tensor]]:
    """Return names of noise levels, and score differences of the pairs ``(count,)`` by arm and level."""
    exact, half = (RewardModel.from_pretrained(path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    vae, process = exact.backbone.vae, exact.backbone.noise_process
    flow = isinstance(process, FlowMatching)
    levels = process.timesteps_at(torch.tensor(SIGMAS)) if flow else torch.tensor(TIMESTEPS)
    names = [f"σ {sigma:g}" for sigma in SIGMAS] if flow else [f"t {timestep}" for timestep in TIMESTEPS]
    generator, found = torch.Generator().manual_seed(0), defaultdict(list)
    drawn = draw_pairs("test", count, np.random.default_rng(0))
    for start in range(0, count, BATCH):
        pairs = drawn[start : start + BATCH]
        pixels = torch.stack(
            [*(as_pixels(pair.first.jpeg) for pair in pairs), *(as_pixels(p.second.jpeg) for p in pairs)]
        )
        with autocast():
            latents = {"VAE": vae.encode(pixels)}
        latents["float32"] = vae.encode(pixels)
        prompts = [pair.caption for pair in pairs] * 2
        known = {model: model.encode_prompts(prompts) for model in (exact, half)}
        for level, name in zip(levels, names, strict=True):
            noise = torch.randn(len(pairs), *latents["VAE"].shape[1:], generator=generator).repeat(2, 1, 1, 1)
            for arm, source, model, context in (
                ("float32", "float32", exact, nullcontext),
                ("autocast", "float32", exact, autocast),
                ("set_precision", "float32", half, nullcontext),
                ("VAE under autocast", "VAE", exact, nullcontext),
                ("set_precision, VAE under autocast", "VAE", half, nullcontext),
            ):
                steps = level.repeat(len(pixels))
                with context():
                    scores = model(process.add_noise(latents[source], noise, steps), steps, *known[model]).float()
                found[arm, name].append(scores[: len(pairs)] - scores[len(pairs) :])
    return names, {key: torch.cat(parts) for key, parts in found.items()}


def as_pixels(data: bytes) -> Tensor:
    """Decode an image into ``(3, H, W)`` in [-1, 1]."""
    return torch.from_numpy(np.array(Image.open(BytesIO(data)).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def rankings(paths: list[str], count: int) -> Iterator[list[str]]:
    """Yield the rows of the first table."""
    for path in paths:
        names, found = gaps(path, count)
        for arm in dict.fromkeys(arm for arm, _ in found if arm != "float32"):
            cells = []
            for name in names:
                exact, changed = found["float32", name], found[arm, name]
                turned = ((exact > 0) != (changed > 0)).float().mean().item()
                cells.append(f"{turned:.2%}; {((changed - exact).abs().mean() / exact.std()).item():.2%}")
            yield [path, arm, *cells]


def kept_pairs(path: str, count: int) -> Iterator[list[str]]:
    """Yield the rows of the second table for one reward."""
    policy = PolicySource("sd_tiny").load().eval()
    prompts = tuple(dict.fromkeys(pair.caption for pair in draw_pairs("train", 4 * count, np.random.default_rng(1))))[
        :count
    ]
    batch = PromptBatch(tuple(f"{number}" for number in range(len(prompts))), prompts)
    sampling, selection = Sampling(num_inference_steps=20, eta=1.0), SigmaThreshold(low=0.05, high=0.15)
    sampler = sampling.sampler(policy.family)

    def select(reward: Any, context: Callable[[], Any]) -> list[Tensor]:
        with context():
            steps = candidate_steps(
                policy, sampler, reward, batch, Branching(), sampling, 1.0, RolloutDraws(0, batch.keys)
            )
            return [
                torch.stack(parts)
                for parts in zip(*(vars_of(selection.select(s, sampler)) for s in steps), strict=True)
            ]

    exact, half = (LatentReward(path, share="never").load(policy) for _ in range(2))
    half.set_precision(torch.bfloat16)
    reference = select(exact, nullcontext)
    yield [path, "float32", f"{reference[2].float().mean().item():.2%}", "", ""]
    for arm, reward, context in (("autocast, policy too", exact, autocast), ("set_precision", half, nullcontext)):
        found = select(reward, context)
        same = (found[0] == reference[0]) & (found[1] == reference[1])
        yield [
            path,
            arm,
            f"{found[2].float().mean().item():.2%}",
            f"{(found[2] != reference[2]).float().mean().item():.2%}",
            f"{(~same & reference[2]).float().mean().item():.2%}",
        ]


def vars_of(selected: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return winners, losers and kept pairs."""
    return selected.winner, selected.loser, selected.kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", nargs="+", required=True, help="as in scoring.py")
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    rewards = trained_rewards(arguments.reward)
    levels = [f"{sigma:g} / {timestep}" for sigma, timestep in zip(SIGMAS, TIMESTEPS, strict=True)]
    table(
        f"{arguments.pairs} pairs, at σ / t: share turned against float32; mean change of differences / deviation",
        ["reward", "bfloat16", *levels],
        rankings(rewards, arguments.pairs),
    )
    table(
        f"LPO, {arguments.prompts} prompts, 19 steps with candidates",
        ["reward", "precision", "pairs above the threshold", "selection differs from float32", "other best or worst"],
        (row for path in rewards for row in kept_pairs(path, arguments.prompts)),
    )
