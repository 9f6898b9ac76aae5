"""Trainings of ``released_utility.py`` by released code: NFT, flow_grpo and LeapAlign, on the tiny SD3.5.

The epochs of NFT and flow_grpo are cut out of the released scripts and executed as they are (``released_scripts.py``):
sampling, advantages by prompt, update, and the decay of the policy that samples. LeapAlign's
``train_sd35_one_step`` is imported. In float32 on a CPU, with these settings and stand-ins:

- All: the reward is our latent reward of the finished latents at σ = 0.2, with one noise for all samples of a prompt;
  pictures are not decoded. Prompts are encoded by our policy, each text once, since the tiny SD3.5 has no T5. No moving
  average of weights, no evaluation, no logs, no process group (DataParallel in place of DDP), a constant rate.
- NFT: the solver is ``flow`` (Euler steps, as ours) in place of ``dpm2``; 4 updates of 32 samples at 9 levels for each
  rollout of 16 prompts with 8 samples (ours: 3 updates of 384 rows, which its loop cannot have).
- flow_grpo: no guidance; 8 updates of 16 samples at 9 steps for each rollout (ours: updates of 128 rows); it samples
  in batches as large as its updates. accelerate is its own, on the CPU.
- LeapAlign: beside ReFL to a state, with its batches of 16 and 20 steps. LoRA in place of FSDP's full weights, no
  guidance, float32 in place of bfloat16; the bound of its hinge is above all rewards, as the released one is.
  h = w = 64 gives latents of 8 x 8, as it divides by 8. Prompts are encoded before the start, as its data set does.
"""

import ast
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from released_policies import given, released_network
from released_scripts import add_released, part_of, script
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentreward.alignment import score_finished
from latentreward.core.contracts import PromptBatch
from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline

SIGMA = 0.2
"""Noise level at which finished latents are scored."""


class Undecoded(nn.Module):
    """Stand-in for a VAE that gives back the latents as the sampler has them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = vae.config, vae.dtype, vae.device

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """Return the latents with the sampler's scale."""
        return ((latents - self.config.shift_factor) * self.config.scaling_factor,)


class Reward:
    """Our latent reward for released code; each call has new noise, one for all samples of a prompt."""

    def __init__(self, module: Any) -> None:
        self.reward, self.seed, self.calls = module.reward.eval(), module.seed, itertools.count()

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score finished latents in any order, each prompt with equally many."""
        order, distinct = torch.tensor(sorted(range(len(prompts)), key=prompts.__getitem__)), sorted({*prompts})
        call = next(self.calls)
        batch = PromptBatch(tuple(distinct), tuple(f"{call}/{prompt}" for prompt in distinct))
        return score_finished(self.reward, latents[order], batch, self.seed, (SIGMA,))[order.argsort()]


class AtOnce:
    """Executor that works when work is submitted, in this thread."""

    def submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Return a future with the result."""
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **options))
        return future


def rollout_names(released: ModuleType, run: Any, theirs: Any, batch: int, of_prompt: int) -> dict[str, Any]:
    """Return what both cut-out epochs read to sample ``batch`` at once, ``of_prompt`` for each prompt, and score."""
    module, prompts = run.model, [{"prompt": prompt, "metadata": {}} for prompt in run.data.prompts]
    pipeline = load_pipeline(PIPELINE_FOLDERS["sd35_tiny"])
    pipeline.transformer, pipeline.vae = theirs, Undecoded(pipeline.vae)
    pipeline.image_processor = SimpleNamespace(postprocess=lambda images, output_type: images)
    sampler = released.DistributedKRepeatSampler(prompts, batch, of_prompt, 1, 0, module.seed)
    collate, reward = released.TextPromptDataset.collate_fn, Reward(module)
    uncond = module.policy.encode_prompts([""] * batch)

    def encode(texts: Sequence[str], *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        found = module.policy.encode_prompts(texts)
        return found.prompt_embeds, found.pooled_prompt_embeds

    return {
        "pipeline": pipeline,
        "train_sampler": sampler,
        "train_iter": iter(DataLoader(prompts, batch_sampler=sampler, collate_fn=collate)),
        "compute_text_embeddings": encode,
        "text_encoders": None,
        "tokenizers": [pipeline.tokenizer],
        "sample_neg_prompt_embeds": uncond.prompt_embeds,
        "sample_neg_pooled_prompt_embeds": uncond.pooled_prompt_embeds,
        "executor": AtOnce(),
        "reward_fn": lambda latents, texts, *_, **__: ({"avg": reward(latents, texts)}, {}),
        "stat_tracker": released.PerPromptStatTracker(True),
    }


def released_nft(root: Path, run: Any) -> tuple[Callable[[], None], Any, Any]:
    """Return DiffusionNFT's training, its network and its optimiser."""
    released, module = script(root, "DiffusionNFT", "scripts/train_nft_sd3.py"), run.model
    theirs = released_network(module.policy.network, "old")
    trained, old = ([w for n, w in theirs.named_parameters() if f".{name}." in n] for name in ("default", "old"))
    steps, samples = module.sampling.num_inference_steps, run.data.prompts_per_rollout * module.num_samples
    sample = SimpleNamespace(
        num_batches_per_epoch=1,
        train_batch_size=samples,
        num_steps=steps,
        guidance_scale=1.0,
        noise_level=0.0,
        deterministic=True,
        solver="flow",
    )
    train = SimpleNamespace(
        batch_size=32,
        gradient_accumulation_steps=1,
        num_inner_epochs=1,
        max_grad_norm=1.0,
        adv_clip_max=module.loss.max_advantage,
        beta=module.loss.kl_weight,
        ema=False,
    )
    config = SimpleNamespace(
        num_epochs=10**9,
        eval_freq=1,
        save_freq=1,
        debug=True,
        resolution=32,
        sample=sample,
        train=train,
        use_lora=True,
        per_prompt_stat_tracking=True,
        decay_type=1,
        beta=module.loss.beta,
    )
    optimizer = module.optimizer(trained)
    names = rollout_names(released, run, theirs, samples, module.num_samples) | {
        "config": config,
        "first_epoch": 0,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "is_main_process": lambda rank: False,
        "gather_tensor_to_all": lambda tensor, world_size: tensor,
        "dist": MagicMock(),
        "transformer_ddp": nn.DataParallel(theirs),
        "transformer_trainable_parameters": trained,
        "old_transformer_trainable_parameters": old,
        "optimizer": optimizer,
        "num_train_timesteps": int(steps * 0.99),
        "enable_amp": False,
        "mixed_precision_dtype": None,
        "scaler": None,
        "ema": None,
    }
    part_of(released, ast.With, "return_decay(")(names | {"global_step": 0})  # at step 0 it is a copy
    return partial(part_of(released, ast.For, "config.num_epochs"), names), theirs, optimizer


def released_grpo(root: Path, run: Any) -> tuple[Callable[[], None], Any, Any]:
    """Return flow_grpo's training, its network and its optimiser."""
    from accelerate import Accelerator

    class Silent(Accelerator):
        """Accelerator of a process that logs nothing."""

        is_main_process = is_local_main_process = False

    released, module, batch = script(root, "flow_grpo", "scripts/train_sd3.py"), run.model, 16
    theirs, steps = released_network(module.policy.network), module.sampling.num_inference_steps
    batches, trained = run.data.prompts_per_rollout * module.num_trajectories // batch, int(steps * 0.99)
    sample = SimpleNamespace(
        num_batches_per_epoch=batches,
        train_batch_size=batch,
        num_steps=steps,
        guidance_scale=1.0,
        noise_level=module.sampling.noise_level,
    )
    train = SimpleNamespace(
        num_inner_epochs=1,
        cfg=False,
        max_grad_norm=1.0,
        ema=False,
        beta=module.loss.kl_weight,
        adv_clip_max=module.loss.max_advantage,
        clip_range=module.loss.clip_range,
    )
    config = SimpleNamespace(
        eval_freq=10**9,
        save_freq=10**9,
        resolution=32,
        per_prompt_stat_tracking=True,
        sample=sample,
        train=train,
    )
    plain = module.optimizer([weight for weight in theirs.parameters() if weight.requires_grad])
    accelerator = Silent(cpu=True, gradient_accumulation_steps=trained)
    transformer, optimizer = accelerator.prepare(nn.DataParallel(theirs), plain)
    names = rollout_names(released, run, theirs, batch, module.num_trajectories) | {
        "config": config,
        "accelerator": accelerator,
        "transformer": transformer,
        "transformer_trainable_parameters": None,
        "optimizer": optimizer,
        "num_train_timesteps": trained,
        "autocast": nullcontext,
        "eval": lambda *_: None,
        "eval_reward_fn": None,
        "test_dataloader": None,
        "ema": None,
    }
    return partial(part_of(released, ast.While, "stat_tracker"), names), theirs, plain


def released_leapalign(root: Path, run: Any) -> tuple[Callable[[], None], Any, Any]:
    """Return LeapAlign's training, its network and its optimiser."""
    add_released(root, "FlowBP")
    released, module = import_module("flowbp.trainers.sd35.leapalign"), run.model
    float32 = ModuleType("torch")
    vars(float32).update(vars(torch), bfloat16=torch.float32)
    replaced = {"torch": float32, "dist": MagicMock(), "_decode_sd35_latents": lambda args, vae, latents: latents}
    vars(released).update(replaced)
    theirs, steps = released_network(module.policy.network), module.sampling.num_inference_steps
    weights = [weight for weight in theirs.parameters() if weight.requires_grad]
    theirs.clip_grad_norm_ = partial(nn.utils.clip_grad_norm_, weights)  # FSDP's
    captions, reward = run.data.prompts, Reward(module)
    encoded = module.policy.encode_prompts(captions)
    generator = torch.Generator().manual_seed(module.seed)

    def loader() -> Iterator[tuple[Any, ...]]:
        while True:
            for rows in torch.randperm(len(captions), generator=generator).split(run.data.batch_size):
                text = given(encoded.select(rows.tolist()))
                yield *text.values(), None, None, [captions[row] for row in rows.tolist()]

    def score(latents: Tensor, texts: Tensor) -> dict[str, Tensor]:
        found = reward(latents, [captions[row] for row in texts.tolist()])[:, None]
        return {"image_features": found, "text_features": torch.ones_like(found)}

    args = SimpleNamespace(
        trainer="leapalign",
        h=64,
        w=64,
        rollout_steps=steps,
        sampling_steps=steps,
        min_idx=1,
        max_idx=steps + 1,
        alpha=0.3,
        tau=0.1,
        cfg_guidance=1.0,
        max_grad_norm=1.0,
        use_hpsv2=True,
        loss_relu_clip=1e3,
        loss_grad_scale=1.0,
        gradient_accumulation_steps=1,
    )
    scheduler = released.FlowMatchEulerDiscreteWithPredX0Scheduler.from_config(
        load_pipeline(PIPELINE_FOLDERS["sd35_tiny"]).scheduler.config
    )
    optimizer = module.optimizer(weights)
    step = partial(
        released.train_sd35_one_step,
        *(args, 0, "cpu", theirs, None, scheduler, score),
        lambda texts: torch.tensor([captions.index(text) for text in texts]),
        *(optimizer, MagicMock(), loader(), lambda latents: latents, generator),
    )

    def train() -> None:
        while True:
            step()

    return train, theirs, optimizer


RELEASED = {
    "released NFT": ("DiffusionNFT", released_nft),
    "released flow_grpo": ("trajectory GRPO", released_grpo),
    "released LeapAlign": ("ReFL to a state", released_leapalign),
}
"""Arm -> arm of ours with its settings, and what makes it."""
