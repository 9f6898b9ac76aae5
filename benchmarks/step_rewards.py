"""Measure rewards at the steps of a sampler in the tiny world: their accuracy, and the gain of choosing by them.

    python benchmarks/step_rewards.py [agreement] [search] [--seeds 3] [--pairs 600] [--prompts 192]

``agreement``  by timestep: share of held-out pairs that are ranked like the noiseless utility, by the LRM on noisy
               latents and by SPO's scorer on decoded predictions x̂_0; and how often a ranking differs from the ranking
               at t = 1
``search``     utility of the shipped tiny SD's pictures of held-out captions: plain, best of N, and step-wise search

LRMs are those of ``tiny_alignment.py``, one per seed; missing ones are trained. The pixel scorer is the shipped one.
Utilities are given by the tiny world's judge, which is never a reward. Intervals (95 %) resample seeds and captions.
"""

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from measuring import table
from PIL import Image
from tiny_alignment import train_reward
from torch import Tensor

from latentreward.contracts import NoisyStates, PromptBatch
from latentreward.generation import Candidates, StepSearch, best_of_n, policy_of, search_latents
from latentreward.metrics.bootstrap import bootstrap_interval
from latentreward.policies import Policy, PolicySource
from latentreward.rewards import LatentReward, PixelReward, Reward
from latentreward.rollout import PromptedPolicy, Sampling, sample_latents
from latentreward.scorers import StepAwareScorer
from latentreward.tinyworld.captions import held_out_captions
from latentreward.tinyworld.oracle import utility_scores
from latentreward.tinyworld.pairs import Pair, draw_pairs, generate_pairs
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline

LEAST_GAP = 0.3
TIMESTEPS = (1, 201, 401, 601, 801, 951)
GUIDANCE = 3.0
CHUNK = 64
CAPTION_SEED = 11


def load_rewards(policy: Policy, output: Path, seeds: int) -> dict[str, list[Reward]]:
    """Load one LRM per seed, training missing ones, and the shipped pixel scorer."""
    lrms = [train_reward(output, "lrm_tiny", "pickapic", seed) for seed in range(seeds)]
    latent: list[Reward] = [LatentReward(str(path)).load(policy).eval() for path in lrms]
    return {"LRM": latent, "pixels": [PixelReward(StepAwareScorer("spm_tiny")).load(policy).eval()]}


# --- agreement -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_clean(policy: Policy, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
    """Predict x̂_0 from noisy latents at one timestep by the policy with guidance."""
    network = PromptedPolicy.of(policy, PromptBatch(tuple(prompts), tuple(prompts)), GUIDANCE)
    output = network(noisy, float(timesteps[0]))
    alpha_bar = 1 - policy.noise_process.sigma(timesteps[:1]).item() ** 2
    return (noisy - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5


def margins(
    policy: Policy, rewards: dict[str, list[Reward]], pairs: Sequence[Pair], timestep: int, seed: int
) -> dict[str, np.ndarray]:
    """Compute each pair's first minus second score at a timestep, by kind of reward and by the judge on x̂_0.

    Returns:
        Kind → ``(rewards, pairs)`` margins.
    """
    assert policy.vae is not None
    images = [Image.open(io.BytesIO(picture.jpeg)) for pair in pairs for picture in (pair.first, pair.second)]
    prompts = [pair.caption for pair in pairs for _ in range(2)]
    generator = torch.Generator().manual_seed(1000 * seed + timestep)
    found: dict[str, list[list[np.ndarray]]] = {"LRM": [], "pixels": [], "judge": []}
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images[rows]])
        latents = policy.vae.encode(pixels)
        timesteps = torch.full((len(latents),), float(timestep))
        noise = torch.randn(latents.shape, generator=generator)
        noisy = policy.noise_process.add_noise(latents, noise, timesteps)
        clean = predict_clean(policy, noisy, timesteps, prompts[rows])
        states = NoisyStates(noisy, timesteps, torch.arange(len(latents)), clean)
        with torch.no_grad():
            for kind, models in rewards.items():
                scores = [model(states, model.encode_prompts(prompts[rows])).numpy() for model in models]
                found[kind].append(scores)
        predicted = ((policy.vae.decode(clean).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found["judge"].append([utility_scores(prompts[rows], list(predicted)).numpy()])
    joined = {kind: np.concatenate([np.stack(part) for part in parts], axis=1) for kind, parts in found.items()}
    return {kind: scores[:, ::2] - scores[:, 1::2] for kind, scores in joined.items()}


def agreement(
    policy: Policy, rewards: dict[str, list[Reward]], pairs: Sequence[Pair], seed: int
) -> Iterator[list[str]]:
    """Yield a table row per timestep for one set of pairs."""
    gaps = np.array([pair.first.utility - pair.second.utility for pair in pairs])
    pairs = [pair for pair, gap in zip(pairs, gaps, strict=True) if abs(gap) > LEAST_GAP]
    gaps = gaps[abs(gaps) > LEAST_GAP]
    at_start: dict[str, np.ndarray] = {}
    for timestep in TIMESTEPS:
        found = margins(policy, rewards, pairs, timestep, seed)
        at_start = at_start or found
        right = {kind: (margin * gaps > 0).mean(axis=1) for kind, margin in found.items()}
        flipped = {kind: (margin * at_start[kind] < 0).mean() for kind, margin in found.items()}
        worse = (found["judge"] * gaps < 0).mean()
        alike = (found["judge"] == 0).mean()
        accuracies = [spread(list(right[kind])) for kind in ("LRM", "pixels")]
        flips = [f"{flipped[kind]:.3f}" for kind in ("LRM", "pixels")]
        yield [str(timestep), *accuracies, *flips, f"{worse:.3f}", f"{alike:.3f}"]


def spread(values: Sequence[float]) -> str:
    """Format the mean of values, and their standard deviation if there are several."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def measure_agreement(policy: Policy, rewards: dict[str, list[Reward]], count: int) -> None:
    """Print tables for rendered pairs ("drawn") and for pairs sampled by the tiny pipelines ("generated")."""
    columns = ("timestep", "LRM", "x̂_0, decoder, SPO's scorer", "LRM differs from t = 1", "SPO's scorer differs")
    judged = ("judge on x̂_0 turns round", "judge on x̂_0 sees no difference")
    sets = {"drawn": draw_pairs("test", count, np.random.default_rng([0, 3])), "generated": generate_pairs(count, 0)}
    for name, pairs in sets.items():
        title = f"Share of {name} pairs ranked as the utility (more than {LEAST_GAP} apart); noise of its own per image"
        table(title, (*columns, *judged), agreement(policy, rewards, pairs, 0))


# --- search --------------------------------------------------------------------------------------------------------


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
    captions = held_out_captions(prompts, CAPTION_SEED)
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
    table(f"Search, sd_tiny, {prompts} held-out captions, {steps} steps", columns, rows)


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["agreement", "search"], metavar="PART")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_alignment"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = PolicySource("sd_tiny").load().eval()
    rewards = load_rewards(policy, options.output.resolve(), options.seeds)
    if "agreement" in options.parts:
        measure_agreement(policy, rewards, options.pairs)
    if "search" in options.parts:
        measure_search(policy, rewards, options.prompts, options.steps)


if __name__ == "__main__":
    main()
