"""LPO (arXiv:2502.01051) in one file: at each sampler step a policy learns to prefer the next state that scores higher.

    python examples/one_file_lpo.py runs/one_file_lrm/reward --rounds 8 --output runs/one_file_lpo

runs on a CPU, with the tiny Stable Diffusion that comes with the package. `latentreward fit` computes the same rollout
and the same step (`latentreward.alignment.LPOModule`) and adds configs, resuming, several GPUs, logs and refusals.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latentreward.alignment import (
    DDIMSampler,
    LatentReward,
    Policy,
    PolicySource,
    Reward,
    Sampling,
    StepDPO,
    TrainedLoRA,
    Transition,
)
from latentreward.core.contracts import NoisyStates
from latentreward.diffusion import LoRA
from latentreward.tinyworld import TinyWorldPromptDataModule

STEPS, CANDIDATES, GUIDANCE = 20, 4, 1.0
PROMPTS, BATCH = 32, 64
LOW, HIGH = 0.05, 0.15  # thresholds of a pair's gap at the least and the most noise; 0.35 and 0.5 in the paper


class Pairs(NamedTuple):
    """Pairs of next states, one row each: a state, its timestep and prompt, its better and its worse candidate."""

    latents: Tensor
    timesteps: Tensor
    prompts: list[str]
    better: Tensor
    worse: Tensor


def transition(policy: Policy, sampler: DDIMSampler, latents: Tensor, times: Tensor, prompts: list[str]) -> Transition:
    """Return the Gaussian of the next states (mean and standard deviation) from states at timesteps `(B,)`."""
    prompt_embeds = policy.encode_prompts(prompts)
    uncond = policy.encode_uncond() if GUIDANCE > 1 else None
    output = policy.predict_guided(latents, times, prompt_embeds, uncond, GUIDANCE)
    return sampler.transition(latents, output, times)


@torch.no_grad()
def roll_out(
    policy: Policy, reward: Reward, sampler: DDIMSampler, prompts: list[str], generator: torch.Generator
) -> Iterator[Pairs]:
    """Sample pictures of prompts, and yield pairs of candidates of each step whose scores differ enough."""
    rows = torch.arange(len(prompts))
    encoded = reward.encode_prompts(prompts)
    latents = torch.randn(len(prompts), *policy.latent_shape(), generator=generator)
    least, most = sampler.noise_std[sampler.noise_std > 0].aminmax()
    for index, timestep in sampler.steps():
        times = torch.full((len(prompts),), timestep)
        step = transition(policy, sampler, latents, times, prompts)
        candidates = step.sample(torch.randn(CANDIDATES, *latents.shape, generator=generator))  # (K, B, C, h, w)
        if sampler.noise_std[index] == 0:  # some schedulers end with a step that has but one next state
            return
        states = NoisyStates(candidates.flatten(0, 1), times.repeat(CANDIDATES), rows.repeat(CANDIDATES))
        scores = reward(states, encoded).view(CANDIDATES, -1)  # at the timestep of the state before, as in the paper
        best, worst = scores.argmax(dim=0), scores.argmin(dim=0)
        # The gap is the difference of the two candidates' probabilities to win against each other.
        gap = torch.tanh((scores[best, rows] - scores[worst, rows]) / 2)
        # The threshold is linear in the standard deviation of the step, which is largest at the most noise.
        threshold = LOW + (sampler.noise_std[index] - least) / (most - least) * (HIGH - LOW)
        kept = (gap > threshold).nonzero().flatten()
        texts = [prompts[row] for row in kept]
        yield Pairs(latents[kept], times[kept], texts, candidates[best[kept], kept], candidates[worst[kept], kept])
        latents = candidates[torch.randint(CANDIDATES, (len(prompts),), generator=generator), rows]


def batches(pairs: Sequence[Pairs], generator: torch.Generator) -> Iterator[Pairs]:
    """Yield the pairs of all steps in random order, in batches."""
    latents, times, better, worse = (torch.cat([getattr(part, name) for part in pairs])
                                     for name in ("latents", "timesteps", "better", "worse"))  # fmt: skip
    prompts = [prompt for part in pairs for prompt in part.prompts]
    for rows in torch.randperm(len(prompts), generator=generator).split(BATCH):
        yield Pairs(latents[rows], times[rows], [prompts[row] for row in rows], better[rows], worse[rows])


def step_loss(policy: Policy, sampler: DDIMSampler, batch: Pairs, loss: StepDPO) -> Tensor:
    """Compute DPO's loss of pairs of next states, with the policy without its adapter as reference."""
    given = (sampler, batch.latents, batch.timesteps, batch.prompts)
    now = transition(policy, *given)
    with torch.no_grad(), policy.reference():
        before = transition(policy, *given)
    return loss(
        now.log_prob(batch.better),
        now.log_prob(batch.worse),
        before.log_prob(batch.better),
        before.log_prob(batch.worse),
    ).loss


def main(args: Sequence[str] | None = None) -> None:
    """Align the tiny Stable Diffusion with a reward model, and save its LoRA weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", help="folder of a reward model, such as one_file_lrm.py writes")
    parser.add_argument("--rounds", type=int, default=8, help="number of rollouts")
    parser.add_argument("--output", type=Path, default=Path("runs/one_file_lpo"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)

    generator = torch.Generator().manual_seed(given.seed)
    source = PolicySource("sd_tiny", lora=LoRA(rank=8, alpha=8))
    policy = source.load(given.seed).eval()  # dropout would differ between the policy and its reference
    reward = LatentReward(given.reward).load(policy)
    sampler = Sampling(num_inference_steps=STEPS, eta=1.0).sampler(source.resolve_family())
    captions = TinyWorldPromptDataModule().prompts
    weights = [weight for weight in policy.parameters() if weight.requires_grad]  # those of the adapter
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=1e-4)
    loss = StepDPO(beta=500.0, clip_range=0.1)
    for number in range(given.rounds):
        drawn = torch.randperm(len(captions), generator=generator)[:PROMPTS]
        pairs = [*roll_out(policy, reward, sampler, [captions[row] for row in drawn], generator)]
        values = []
        for batch in batches(pairs, generator):
            value = step_loss(policy, sampler, batch, loss)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            values.append(value.item())
        kept = sum(len(part.prompts) for part in pairs)
        print(f"rollout {number + 1}: {kept} pairs kept, loss {sum(values) / len(values):.4f}", flush=True)
    path = TrainedLoRA.of_policy(policy).write(given.output / "lora")
    print(f"{path}: pipeline.load_lora_weights of diffusers reads it")


if __name__ == "__main__":
    main()
