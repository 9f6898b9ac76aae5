"""Measure rollouts and updates of LPO, GRPO, DiffusionNFT and ReFL against the released code; prints a Markdown table.

    python benchmarks/released_alignment.py [--released DIR] [--sizes small small_sd35] [--batch 2] [--repeats 5]

DIR holds clones of github.com/Kwai-Kolors/LPO, HKUST-C4G/diffusion-rm, yifan123/flow_grpo and NVlabs/DiffusionNFT.
Without DIR only this project's side is measured. Samplers, losses' steps and reward models of the clones are imported
as they are; the training loops, which are no functions, are cut out of the released files and executed as they are
(``released_scripts.py``). ReFL with a latent reward was never released: its loop is transcribed here from the paper
(arXiv:2304.05977) around the released reward model.

Both sides have equal random weights and get equal prompts, states, timesteps and rewards, in float32, in turns in one
process. An update is all forward and backward passes of one optimiser step, with clipping (LPO has none) and AdamW. A
rollout samples, decodes where the released code does, and scores; the reward of GRPO and NFT is the images' brightness.
Seconds are processor time of one thread. Operations and kernels are counted (``counting.py``). The peak is that of all
live tensors, weights included.
"""

import argparse
import ast
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from counting import WorkCounter
from measuring import MIB, Goal, interleaved, ratio, table
from random_pipelines import RandomLatentReward
from released import Works, noisy_latents, released_dina
from released_lpo import lpo
from released_policies import (
    RATE,
    FixedPrompts,
    brightness,
    dit_pipeline,
    dit_policy,
    given,
    own_update,
    prepared,
    prompts_of,
    released_network,
)
from released_scripts import add_released, part_of, script
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves

from latentreward.alignment import ClippedPolicyLoss, DiffusionNFTModule, ReFLModule, Sampling, TrajectoryGRPOModule
from latentreward.apps.estimate.shapes import LiveBytes
from latentreward.core.contracts import take_rows

STEPS = 4
"""Steps of a rollout."""


class PeakCounter(WorkCounter):
    """Counter of work that also counts the bytes of live tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveBytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; see :class:`WorkCounter`."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, Tensor):
                self.live.add(leaf)
        return result


# --- GRPO ----------------------------------------------------------------------------------------------------------


def grpo(part: str, size: str, batch: int, root: Path | None) -> Works:
    """Return the sides of GRPO's rollout of one prompt, or of its update on all steps of the samples."""
    modules: list[Any] = []
    module = prepared(
        TrajectoryGRPOModule(
            dit_policy(size),
            brightness(modules),
            sampling=Sampling(STEPS, noise_level=0.7),
            num_trajectories=batch,
            loss=ClippedPolicyLoss(1e-4, kl_weight=0.01),
            guidance_scale=4.5,
            seed=0,
        )
    )
    modules.append(module)
    prompts, repeated = prompts_of(1), ["prompt 0"] * batch
    module.policy.text_encoder = FixedPrompts(prompts.prompts)
    if part == "rollout":
        works: Works = {"ours": lambda: module.roll_out(prompts)}
    else:
        rows = module.roll_out(prompts)
        module.prepare_prompts(prompts.prompts)
        steps = [take_rows(rows, range(start, start + batch)) for start in range(0, len(rows), batch)]
        works = {"ours": own_update(module, steps)}
    if root is None:
        return works
    from accelerate import Accelerator

    released = script(root, "flow_grpo", "scripts/train_sd3.py")
    theirs = released_network(module.policy.network)
    pipeline = dit_pipeline(size, module, theirs)
    embeds, uncond = (module.policy.encode_prompts(texts) for texts in (repeated, [""] * batch))
    height, width = module.policy.native_size

    @torch.no_grad()
    def sample() -> None:
        pipeline.transformer.eval()
        options = {"num_inference_steps": STEPS, "guidance_scale": 4.5, "noise_level": 0.7, "output_type": "pt"}
        images, latents, log_probs = released.pipeline_with_logprob(
            pipeline, **given(embeds, uncond), **options, height=height, width=width
        )
        torch.stack(latents, dim=1), torch.stack(log_probs, dim=1)
        released.PerPromptStatTracker(True).update(repeated, images.mean(dim=(1, 2, 3)).numpy())
        pipeline.transformer.train()

    if part == "rollout":
        return works | {"theirs": sample}
    train = SimpleNamespace(cfg=True, beta=0.01, adv_clip_max=5.0, clip_range=1e-4, max_grad_norm=1.0, ema=False)
    config = SimpleNamespace(train=train, sample=SimpleNamespace(guidance_scale=4.5, noise_level=0.7))
    pipeline.scheduler.set_timesteps(STEPS)
    columns = {
        "latents": [step.latents for step in steps],
        "next_latents": [step.next_latents[:, 0] for step in steps],
        "log_probs": [step.log_prob[:, 0] for step in steps],
        "advantages": [step.advantage[:, 0] for step in steps],
    }
    states = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    states |= given(embeds) | {"timesteps": pipeline.scheduler.timesteps.repeat(batch, 1)}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    transformer, optimizer = accelerator.prepare(nn.DataParallel(theirs), AdamW(trained, RATE))
    names = {
        "config": config,
        "accelerator": accelerator,
        "optimizer": optimizer,
        "pipeline": pipeline,
        "transformer": transformer,
        "samples_batched": [states],
        "num_train_timesteps": STEPS,
        "autocast": nullcontext,
        "info": defaultdict(list),
        "epoch": 0,
        "inner_epoch": 0,
        "train_neg_prompt_embeds": uncond.prompt_embeds,
        "train_neg_pooled_prompt_embeds": uncond.pooled_prompt_embeds,
    }
    update = part_of(released, ast.For, "enumerate(samples_batched)")
    return works | {"theirs": lambda: update(names)}


# --- DiffusionNFT --------------------------------------------------------------------------------------------------


def nft(part: str, size: str, batch: int, root: Path | None) -> Works:
    """Return the sides of DiffusionNFT's rollout of one prompt, or of its update on all but one step of the samples."""
    modules: list[Any] = []
    module = prepared(
        DiffusionNFTModule(dit_policy(size), brightness(modules), sampling=Sampling(STEPS), num_samples=batch, seed=0)
    )
    modules.append(module)
    prompts, repeated, after = prompts_of(1), ["prompt 0"] * batch, 100
    module.policy.text_encoder = FixedPrompts(prompts.prompts)
    progress = module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = after  # optimiser steps, on which the copy's decay depends

    def roll_out() -> Any:
        module.followed = -1  # the copy that samples moves before each rollout
        return module.roll_out(prompts)

    if part == "rollout":
        works: Works = {"ours": roll_out}
    else:
        rows = roll_out()
        module.prepare_prompts(prompts.prompts)
        count = len(rows) // batch
        steps = [take_rows(rows, range(step, len(rows), count)) for step in range(count)]
        works = {"ours": own_update(module, steps)}
    if root is None:
        return works
    released = script(root, "DiffusionNFT", "scripts/train_nft_sd3.py")
    theirs = released_network(module.policy.network, "old")
    pipeline = dit_pipeline(size, module, theirs)
    embeds = module.policy.encode_prompts(repeated)
    trained, old = ([w for n, w in theirs.named_parameters() if f".{name}." in n] for name in ("default", "old"))
    train = SimpleNamespace(adv_clip_max=5.0, beta=1e-4, max_grad_norm=1.0, ema=False)
    config = SimpleNamespace(
        train=train, sample=SimpleNamespace(guidance_scale=1.0), use_lora=True, beta=1.0, decay_type=1
    )
    follow = part_of(released, ast.With, "return_decay(")
    moved = {
        "config": config,
        "global_step": after,
        "transformer_trainable_parameters": trained,
        "old_transformer_trainable_parameters": old,
    }
    height, width = module.policy.native_size

    @torch.no_grad()
    def sample() -> None:
        follow(moved)
        pipeline.transformer.eval()
        theirs.set_adapter("old")
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt", "solver": "flow"}
        images, latents, _ = released.pipeline_with_logprob(
            pipeline, **given(embeds, embeds), **options, height=height, width=width, deterministic=True
        )
        theirs.set_adapter("default")
        torch.stack(latents, dim=1)
        released.PerPromptStatTracker(True).update(repeated, images.mean(dim=(1, 2, 3)).numpy())
        pipeline.transformer.train()

    if part == "rollout":
        return works | {"theirs": sample}
    states = given(embeds) | {
        "latents_clean": steps[0].latents,
        "timesteps": torch.stack([step.timesteps for step in steps], dim=1),
        "advantages": torch.stack([step.advantage for step in steps], dim=1),
    }
    names = moved | {
        "transformer_ddp": nn.DataParallel(theirs),
        "samples_batched_list": [states],
        "device": "cpu",
        "rank": 0,
        "num_train_timesteps": len(steps),
        "effective_grad_accum_steps": len(steps),
        "optimizer": AdamW(trained, RATE),
        "enable_amp": False,
        "mixed_precision_dtype": None,
        "scaler": None,
        "ema": None,
        "dist": MagicMock(),
        "info_accumulated": defaultdict(list),
        "epoch": 0,
        "inner_epoch": 0,
    }
    update = part_of(released, ast.For, "enumerate(samples_batched_list)")
    return works | {"theirs": lambda: update(names)}


# --- ReFL ----------------------------------------------------------------------------------------------------------


def refl(size: str, batch: int, root: Path | None) -> Works:
    """Return the sides of ReFL's step: sampling, the reward of the last prediction, and its gradient."""
    settings: dict[str, Any] = {"stop_range": (2, 2), "reward_sigmas": (0.4,), "guidance_scale": 1.0, "seed": 0}
    settings["kl_weight"] = 0.0  # the paper's
    sampling = Sampling(STEPS, noise_level=0.0)
    module = prepared(ReFLModule(dit_policy(size), RandomLatentReward(size), sampling=sampling, **settings))
    prompts, stop = prompts_of(batch), STEPS - 2
    module.policy.text_encoder = module.reward.model.backbone.text_encoder = FixedPrompts(prompts.prompts)
    works: Works = {"ours": own_update(module, [prompts])}
    if root is None:
        return works
    theirs = released_network(module.policy.network)
    scorer, _ = released_dina(size, module.reward.model, lora=False)
    scorer.eval().requires_grad_(False)
    scheduler = dit_pipeline(size, module, theirs).scheduler
    scheduler.set_timesteps(STEPS)
    embeds = module.policy.encode_prompts(prompts.prompts)
    text = {"encoder_hidden_states": embeds.prompt_embeds, "pooled_projections": embeds.pooled_prompt_embeds}
    weights = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer, level = (
        AdamW(weights, RATE),
        module.reward.model.backbone.noise_process.timesteps_at(torch.tensor([0.4])),
    )

    def predict(latents: Tensor, step: int) -> Tensor:
        return theirs(latents, timestep=scheduler.timesteps[step].repeat(batch), **text, return_dict=False)[0]

    def update() -> None:
        latents = torch.randn_like(noisy_latents(size, batch))
        with torch.no_grad():
            for step in range(stop):
                latents = latents + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * predict(latents, step)
        clean = latents - scheduler.sigmas[stop] * predict(latents, stop)
        noisy = (1 - level / 1000) * clean + level / 1000 * torch.randn_like(clean)
        (-scorer(noisy, timesteps=level.repeat(batch), **text).mean()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return works | {"theirs": update}


# --- table ---------------------------------------------------------------------------------------------------------


def row(name: str, works: Works, repeats: int) -> list[Any]:
    """Measure and count both sides of a case."""
    times = interleaved(works, repeats)
    counted = []
    for work in works.values():
        with PeakCounter() as counter:
            work()
        counted.append((f"{counter.flops / 1e9:.2f}", f"{counter.kernels:,}", f"{counter.live.peak / MIB:.0f}"))
    share = ratio(times["ours"], times["theirs"]) if "theirs" in times else ""
    goal = Goal(share.median, most=1.0) if share else ""
    return [name, times["ours"], times.get("theirs", ""), share, goal, *map(" / ".join, zip(*counted, strict=True))]


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=Path, metavar="DIR")
    parser.add_argument("--sizes", nargs=2, default=["small", "small_sd35"], help="of LPO and of the others")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=[], help="beginnings of names; by default all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root, (unet, dit), batch = options.released, options.sizes, options.batch
    for name in ("LPO", "diffusion-rm") if root else ():
        add_released(root, name)
    cases: dict[str, Callable[[], Works]] = {
        f"LPO, {part}": partial(lpo, part, unet, max(1, batch // 2), root)
        for part in ("rollout", "rollout, prompts given")
    } | {
        "LPO, update": partial(lpo, "update", unet, batch, root),
        "GRPO, rollout": partial(grpo, "rollout", dit, batch, root),
        "GRPO, update": partial(grpo, "update", dit, batch, root),
        "NFT, rollout": partial(nft, "rollout", dit, batch, root),
        "NFT, update": partial(nft, "update", dit, batch, root),
        "ReFL, step (our transcription)": partial(refl, dit, batch, root),
    }

    def rows() -> Iterator[list[Any]]:
        for name, make in cases.items():
            if name.startswith(tuple(options.cases) or ""):
                yield row(name, make(), options.repeats)

    columns = ("case", "ours, s", "released code, s", "ratio", "goal", "GFLOP", "kernels", "peak, MiB")
    table(f"{unet} and {dit}, batches of {batch}, one thread; counts ours / theirs", columns, rows())


if __name__ == "__main__":
    main()
