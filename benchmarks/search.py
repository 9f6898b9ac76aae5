"""Measure the gain of choosing among samples by a reward in the tiny world: plain, best of N, step-wise and population.

    python benchmarks/search.py [--reward lrm_tiny lrm_tiny:1 lrm_tiny:2] [--prompts 192] [--part population]

Each ``--reward`` is a trained LRM (a checkpoint or run; ``lrm_tiny:SEED`` is trained first, below
runs/trained_rewards); the pixel scorer is the shipped one. The tiny world's judge, which is never a reward, gives the
utility of the shipped tiny SD's pictures of held-out captions. Intervals (95 %) resample rewards and captions.
Population search is compared with the best of as many samples as cost the same FLOPs of policy, reward and decoding.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from measuring import flops, table
from torch import Tensor
from trained_rewards import trained_rewards

from latentreward.alignment import LatentReward, PixelReward, Policy, PolicySource, Reward, Sampling, sample_latents
from latentreward.apps.generation import (
    Candidates,
    Population,
    StepSearch,
    best_of_n,
    policy_of,
    search_latents,
    search_population,
)
from latentreward.core.bootstrap import bootstrap_interval
from latentreward.core.contracts import PromptBatch
from latentreward.reward import StepAwareScorer
from latentreward.tinyworld.captions import judged_captions
from latentreward.tinyworld.oracle import utility_scores
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline

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


def through_diffusers(reward: Reward, prompts: PromptBatch, count: int, steps: int, guidance: float) -> Tensor:
    """Sample with step-wise search inside diffusers' own pipeline."""
    pipeline = load_pipeline(PIPELINE_FOLDERS["sd_tiny"])
    search = StepSearch(policy_of(pipeline), reward, prompts.prompts, num_candidates=count)
    return pipeline(
        list(prompts.prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **search.pipeline_arguments(),
    ).images


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
            return best_of_n(sample, reward, batch, number, sigmas=(0.05,))[0]

        def search(reward: Reward, batch: PromptBatch, how: dict = how) -> Tensor:
            return search_latents(policy, reward, batch, Candidates(4), lively, **how)

        def diffusers(reward: Reward, batch: PromptBatch, guidance: float = guidance) -> Tensor:
            return through_diffusers(reward, batch, 4, steps, guidance)

        ways: dict[str, tuple[int, Callable[[Reward, PromptBatch], Tensor]]] = {
            "best of 4": (0, partial(best_of, number=4)),
            "step-wise, K = 4": (1, search),
            "step-wise, K = 4, in diffusers": (1, diffusers),
        }
        for way, (eta, work) in ways.items():
            for kind, models in rewards.items():
                found = [utilities(policy, in_chunks(partial(work, model), captions), captions) for model in models]
                change, low, high, _ = bootstrap_interval([utility - plain[eta] for utility in found])
                interval = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
                rows.append([f"{guidance:g}", way, kind, f"{np.mean(found):.3f}", interval])
    columns = ("guidance", "sampling", "reward", "utility", "against plain sampling with the same eta [95 %]")
    table(f"Search, sd_tiny, {len(captions)} held-out captions, {steps} steps", columns, rows)


def counted(policy: Policy, work: Callable[[PromptBatch], Tensor], captions: Sequence[str]) -> tuple[np.ndarray, float]:
    """Return the judge's utilities of what ``work`` samples, and the FLOPs for each picture, its decoding included."""
    found: list[np.ndarray] = []
    cost = flops(lambda: found.append(utilities(policy, in_chunks(work, captions), captions)))
    return found[0], cost / len(captions)


class Remembered:
    """Samples of ``work``, each chunk of prompts sampled once: the best of N + 1 has all samples of the best of N."""

    def __init__(self, work: Callable[[PromptBatch], Tensor]) -> None:
        self.work, self.samples = work, {}

    def __call__(self, prompts: PromptBatch) -> Tensor:
        """Return the samples of ``prompts``."""
        if prompts.keys not in self.samples:
            self.samples[prompts.keys] = self.work(prompts)
        return self.samples[prompts.keys]


def measure_population(policy: Policy, rewards: Sequence[Reward], prompts: int, steps: int = 20) -> None:
    """Print what population search gains against the best of N samples at equal FLOPs.

    Best of 1 to 6 are sampled; their FLOPs and utilities are interpolated to the population's FLOPs.
    """
    captions, sampling = judged_captions()[:prompts], Sampling(steps, eta=0.0)
    largest = 6
    rows: list[list[str]] = []
    for guidance in (1.0, GUIDANCE):
        how = {"sampling": sampling, "guidance_scale": guidance, "seed": 1}
        sample = partial(sample_latents, policy, **how)
        remembered = Remembered(sample)

        def best_of(reward: Reward, batch: PromptBatch, number: int, sample: Callable) -> Tensor:
            return best_of_n(sample, reward, batch, number, sigmas=(0.05,))[0]

        one, two = (
            counted(policy, partial(best_of, rewards[0], number=n, sample=sample), captions[:8])[1] for n in (1, 2)
        )
        best = {
            n: [
                utilities(policy, in_chunks(partial(best_of, reward, number=n, sample=remembered), captions), captions)
                for reward in rewards
            ]
            for n in range(1, largest + 1)
        }
        for name, population in (("near starts", Population()), ("independent starts", Population(perturbation=1.0))):
            runs = [
                counted(policy, partial(search_population, policy, reward, population=population, **how), captions)
                for reward in rewards
            ]
            cost = float(np.mean([cost for _, cost in runs]))
            number = 1 + (cost - one) / (two - one)  # the FLOPs of best of N are linear in N
            assert 1 <= number <= largest, f"{cost:.3g} FLOPs are not those of best of 1 to {largest}"
            low, share = int(number), number - int(number)
            equal = [
                (1 - share) * best[low][place] + share * best[min(low + 1, largest)][place]
                for place in range(len(rewards))
            ]
            found = [utility for utility, _ in runs]
            change, least, most, _ = bootstrap_interval([a - b for a, b in zip(found, equal, strict=True)])
            rows.append(
                [f"{guidance:g}", name, f"{cost / one:.2f}", f"{number:.2f}", f"{np.mean(found):.3f}",
                 f"{np.mean(equal):.3f}", f"{change:+.3f} [{least:+.3f}, {most:+.3f}]"]
            )  # fmt: skip
    columns = ("guidance", "population of 6", "FLOPs, in samples", "best of N with the same FLOPs: N", "utility",
               "utility of best of N", "difference [95 %]")  # fmt: skip
    table(f"Population search, sd_tiny, {len(captions)} held-out captions, {steps} steps", columns, rows)


def main() -> None:
    """Load the rewards, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", nargs="+", default=["lrm_tiny", "lrm_tiny:1", "lrm_tiny:2"])
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--part", choices=["population", "search"], help="measure one part only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = PolicySource("sd_tiny").load().eval()
    rewards = load_rewards(policy, options.reward)
    if options.part != "search":
        measure_population(policy, rewards["LRM"], options.prompts, options.steps)
    if options.part != "population":
        measure_search(policy, rewards, options.prompts, options.steps)


if __name__ == "__main__":
    main()
