"""Measure the gain of choosing among samples by a reward in the tiny world: plain, best of N and step-wise.

    python benchmarks/search.py [--reward lrm_tiny lrm_tiny:1 lrm_tiny:2] [--prompts 192]

Each ``--reward`` is a trained LRM (a checkpoint or run; ``lrm_tiny:SEED`` is trained first, below
runs/trained_rewards); the pixel scorer is the shipped one. The tiny world's judge, which is never a reward, gives the
utility of the shipped tiny SD's pictures of held-out captions. Intervals (95 %) resample rewards and captions.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from measuring import table
from torch import Tensor
from trained_rewards import trained_rewards

from latentreward.alignment import LatentReward, PixelReward, Policy, PolicySource, Reward, Sampling, sample_latents
from latentreward.apps.generation import Candidates, best_of_n, search_latents
from latentreward.core.bootstrap import bootstrap_interval
from latentreward.core.contracts import PromptBatch
from latentreward.reward import StepAwareScorer
from latentreward.tinyworld.captions import judged_captions
from latentreward.tinyworld.oracle import utility_scores

GUIDANCE = 3.0
CHUNK = 64


def load_rewards(policy: Policy, names: Sequence[str]) -> dict[str, list[Reward]]:
    """Load LRMs, training missing ones, and the shipped pixel scorer."""
    latent: list[Reward] = [LatentReward(path).load(policy).eval() for path in trained_rewards(names)]
    return {"LRM": latent, "pixels": [PixelReward(StepAwareScorer("spm_tiny")).load(policy).eval()]}


def utilities(policy: Policy, latents: Tensor, captions: Sequence[str]) -> np.ndarray:
    """Decode finished latents, and return the judge's utilities."""
    assert policy.vae is not None
    pictures = ((policy.vae.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return utility_scores(captions, list(pictures.numpy())).numpy()


def in_chunks(work: Callable[[PromptBatch], Tensor], captions: Sequence[str]) -> Tensor:
    """Return finished latents of all captions, sampled ``CHUNK`` captions at a time."""
    keys = [str(place) for place in range(len(captions))]
    chunks = [slice(start, start + CHUNK) for start in range(0, len(captions), CHUNK)]
    return torch.cat([work(PromptBatch(tuple(captions[c]), tuple(keys[c]))) for c in chunks])


def measure_search(policy: Policy, rewards: dict[str, list[Reward]], prompts: int, steps: int = 20) -> None:
    """Print the change of utility by each way of choosing, against plain sampling with the same eta."""
    captions = judged_captions()[:prompts]
    still, lively = Sampling(steps, eta=0.0), Sampling(steps, eta=1.0)
    rows: list[list[str]] = []
    for guidance in (1.0, GUIDANCE):
        how = {"guidance_scale": guidance, "seed": 1}
        plain = {
            eta: utilities(policy, in_chunks(partial(sample_latents, policy, sampling=s, **how), captions), captions)
            for eta, s in ((0, still), (1, lively))
        }
        for eta, utility in plain.items():
            rows.append([f"{guidance:g}", f"plain, eta {eta}", "", f"{utility.mean():.3f}", ""])

        def best_of(reward: Reward, batch: PromptBatch, number: int, how: dict = how) -> Tensor:
            sample = partial(sample_latents, policy, sampling=still, **how)
            return best_of_n(sample, reward, batch, number, sigmas=(0.05,)).latents

        def search(reward: Reward, batch: PromptBatch, how: dict = how) -> Tensor:
            return search_latents(policy, reward, batch, Candidates(4), lively, **how)

        ways: dict[str, tuple[int, Callable[[Reward, PromptBatch], Tensor]]] = {
            "best of 4": (0, partial(best_of, number=4)),
            "step-wise, K = 4": (1, search),
        }
        for way, (eta, work) in ways.items():
            for kind, models in rewards.items():
                found = [utilities(policy, in_chunks(partial(work, model), captions), captions) for model in models]
                change, low, high, _ = bootstrap_interval([utility - plain[eta] for utility in found])
                interval = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
                rows.append([f"{guidance:g}", way, kind, f"{np.mean(found):.3f}", interval])
    columns = ("guidance", "sampling", "reward", "utility", "against plain sampling with the same eta [95 %]")
    table(f"Search, sd_tiny, {len(captions)} held-out captions, {steps} steps", columns, rows)


def main() -> None:
    """Load the rewards, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", nargs="+", default=["lrm_tiny", "lrm_tiny:1", "lrm_tiny:2"])
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = PolicySource("sd_tiny").load().eval()
    rewards = load_rewards(policy, options.reward)
    measure_search(policy, rewards, options.prompts, options.steps)


if __name__ == "__main__":
    main()
