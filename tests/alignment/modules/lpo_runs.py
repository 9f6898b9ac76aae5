"""Small LPO runs on tiny pipelines, with a reward that needs no training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks import EncodeOnce, ExactResume, TrainableCheckpoint
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed

from latentreward.alignment import (
    Branching,
    FixedThreshold,
    LPOModule,
    Policy,
    PolicySource,
    Reward,
    RewardSource,
    Sampling,
    StepSampler,
)
from latentreward.core.checkpoints.files import DurableCheckpointIO
from latentreward.core.checkpoints.fsdp2 import FSDP2Strategy
from latentreward.core.checkpoints.shards import whole_tensor
from latentreward.core.contracts import LatentSpace, NoisyStates, StepPairs
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA
from tests.tiny_pipelines import source_of

PROMPTS = tuple(f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "cross"))


class Brightness(Reward):
    """Mean of the first channel, times a scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        return self.scale * states.latents[:, 0].flatten(1).mean(dim=1) + encoded.to(states.rows.device)[states.rows]


@dataclass
class BrightnessSource(RewardSource):
    scale: float = 10.0

    def latent_space(self) -> LatentSpace | None:
        return None

    def load(self, policy: Policy) -> Reward:
        return Brightness(self.scale)


def lpo(
    source: str = "sd15",
    scale: float = 10.0,
    threshold: float = 0.3,
    reward: RewardSource | None = None,
    **options: Any,
) -> LPOModule:
    return LPOModule(
        PolicySource(source_of(source), lora=LoRA(rank=2, alpha=2.0)),
        reward or BrightnessSource(scale),
        **{
            "selection": FixedThreshold(threshold),
            "sampling": Sampling(num_inference_steps=3),
            "candidates": Branching(num_candidates=3),
            "guidance_scale": 2.0,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=1e-3),
            "seed": 0,
            **options,
        },
    )


class SeenKeys(Callback):
    """Keys of this rank's batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: StepPairs, batch_idx: int) -> None:
        self.batches.append(list(batch.keys))


class FirstRankOnly(FixedThreshold):
    """Keeps pairs on rank 0 alone."""

    def keep(self, gap: Tensor, index: int, sampler: StepSampler) -> Tensor:
        return super().keep(gap, index, sampler) & (not distributed.is_initialized() or distributed.get_rank() == 0)


def loaders(world_size: int = 1, **options: Any) -> PromptLoaders:
    """Four rows at a step and four prompts at a rollout, over all processes."""
    settings = {"batch_size": 4 // world_size, "prompts_per_rollout": 4 // world_size, "batches_per_epoch": 4}
    return PromptLoaders(PROMPTS, **{**settings, "seed": 1, **options})


def make_trainer(folder: Path, strategy: Any = "auto", callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """One process, or two where a strategy is named."""
    return Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        callbacks=[ExactResume(seed=5), TrainableCheckpoint(), *callbacks],
        plugins=[DurableCheckpointIO()],
        **{
            "default_root_dir": folder,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **options,
        },
    )


def weights(module: LPOModule) -> dict[str, Tensor]:
    """What trains, whole."""
    return {name: whole_tensor(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}


def saved_run(
    folder: Path,
    strategy: Any = "auto",
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    encode_once: bool = False,
) -> dict[str, Any]:
    """Two epochs of four steps, with a checkpoint after every third: weights, and the keys of this rank's batches."""
    module, seen = lpo(**(options or {})), SeenKeys()
    once = [EncodeOnce()] if encode_once else []
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, enable_version_counter=False)
    trainer = make_trainer(folder, strategy, [seen, saver, *once], enable_checkpointing=True)
    trainer.fit(module, datamodule=loaders(trainer.world_size), ckpt_path=resume, weights_only=True)
    return {"weights": weights(module), "keys": seen.batches, "steps": trainer.global_step}


def cases_of_two(folder: Path) -> dict[str, Any]:
    """On ranks: a run, the rest of it, one in which only rank 0 keeps pairs, and one with prompts encoded once."""
    results: dict[str, Any] = {}
    for name, strategy in (("ddp", lambda: "ddp"), ("fsdp2", FSDP2Strategy)):
        own = folder / name
        results[name] = saved_run(own, strategy())
        results[f"{name} resumed"] = saved_run(folder / "again", strategy(), own / "step=3.ckpt")
        results[f"{name} one rank"] = saved_run(folder / "one", strategy(), None, {"selection": FirstRankOnly(0.3)})
        results[f"{name} encoded once"] = saved_run(folder / "once", strategy(), encode_once=True)
    return results
