"""Measure sampling of the tiny generators: candidates of a prompt together, and adapters merged into the weights.

    python benchmarks/sampling.py [--number 32] [--repeats 3]

Seconds are of processor time: N candidates of one prompt, one after the other and in one batch. Kernels are those of
one pass of the network with the LoRA's layers apart, and with their products added to the weights before.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from counting import WorkCounter
from measuring import Goal, Spread, table

from latentreward.alignment import Policy, PolicySource, Sampling, sample_latents
from latentreward.core.contracts import PromptBatch

PROMPT = "a large red circle on a white background"


def seconds(policy: Policy, parts: Sequence[PromptBatch]) -> float:
    """Return the processor time of sampling batches of candidates."""
    began, scale = time.process_time(), policy.family.guidance(1.0)
    for part in parts:
        sample_latents(policy, part, Sampling(20), scale, 0)
    return time.process_time() - began


def kernels(policy: Policy, merged: bool) -> int:
    """Count the kernels of one pass for one state."""
    latents, prompts = torch.zeros(1, *policy.latent_shape()), policy.encode_prompts([PROMPT])
    counter = WorkCounter()

    def count() -> int:
        with counter, torch.no_grad():
            policy.predict(latents, torch.tensor([501.0]), prompts)
        return counter.kernels

    if not merged:
        return count()
    with policy.adapters.merged():
        return count()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    together: list[list[Any]] = []
    passes: list[list[Any]] = []
    for name in ("sd_tiny", "sd35_tiny"):
        policy, names = PolicySource(name).load().eval(), PromptBatch((PROMPT,), ("0",)).times(options.number)
        every = [(seconds(policy, names.split(1)), seconds(policy, [names])) for _ in range(options.repeats)]
        spreads = [Spread([one[side] for one in every]) for side in (0, 1)]
        ratios = [batch / single for single, batch in every]
        together.append([name, *spreads, Spread(ratios, ".3f"), Goal(Spread(ratios).median, most=0.2)])
        apart, merged = kernels(policy, False), kernels(policy, True)
        passes.append([name, apart, merged, f"{merged / apart:.2f}", Goal(merged / apart, most=0.7)])
    columns = ("generator", "one by one, s", "together, s", "ratio", "goal")
    table(f"{options.number} candidates of one prompt, 20 steps", columns, together)
    columns = ("generator", "LoRA apart", "merged", "ratio", "goal")
    table("Kernels of one pass", columns, passes)


if __name__ == "__main__":
    main()
