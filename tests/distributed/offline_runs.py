"""Runs of Diffusion-DPO and ReFL that are the same on one process and, with half the rows per rank, on two."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.optim import SGD

from latentreward.alignment import DiffusionDPOModule, LinearDPO, PolicySource, ReFLModule, Sampling
from latentreward.alignment.policies.moving_average import DecayRamp
from latentreward.core.checkpoints.shards import changing_names, whole_tensor
from latentreward.data import PairBatchSampler, PromptsAndImages, collate_pairs
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.data.loading import ResumableLoader
from latentreward.diffusion import LoRA
from tests.alignment.modules.batches import loaded_pairs
from tests.alignment.modules.toy_rewards import BrightnessSource
from tests.distributed.strategies import STRATEGIES, strategies_of
from tests.tiny_pipelines import source_of

CASES = [
    ("diffusion_dpo", "sd15"),
    ("diffusion_dpo", "sd35_tiny"),
    ("refl", "sd15"),
    ("refl", "sd35_tiny"),
    ("linear_dpo", "sd35_tiny"),
    ("prfl", "sd35_tiny"),
]
LABELS = (1.0, 0.5, 0.0, 0.8)
PROMPTS = ["a red circle on a black background", "two blue squares on a white background", "a large green cross"]


class Pairs(LightningDataModule):
    """Eight pairs of unlike weights, a tie among them."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> ResumableLoader:
        shares = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        places = PairBatchSampler(8, batch_size=self.batch_size, seed=0, **shares)
        return ResumableLoader(loaded_pairs(8, labels=LABELS), places, collate_fn=collate_pairs)


def make_module(method: str, pipeline: str) -> DiffusionDPOModule | ReFLModule:
    policy = PolicySource(source_of(pipeline), lora=LoRA(rank=4, alpha=4))
    options: dict[str, Any] = {"seed": 1, "optimizer": partial(SGD, lr=0.05)}
    if method == "diffusion_dpo":
        return DiffusionDPOModule(policy, beta=100.0, **options)
    if method == "linear_dpo":
        moving = {"linear": LinearDPO(), "reference": DecayRamp(0.5, 0.5), "optimizer": partial(SGD, lr=1.0)}
        return DiffusionDPOModule(policy, beta=100.0, **{**options, **moving})
    own: dict[str, Any] = {"sampling": Sampling(num_inference_steps=4), "kl_weight": 0.5}
    if method == "prfl":  # steps of the reward, of the images, of the reward
        own |= {"scored": "state", "stop_range": (2, 4), "pretraining_weight": 1.0, "alternate_pretraining": True}
    else:
        own |= {"stop_range": (1, 3), "gradient_steps": 2, "guidance_scale": 2.0}
    return ReFLModule(policy, BrightnessSource(), **own, **options)


def train(method: str, pipeline: str, strategy: Any, world_size: int) -> dict[str, Any]:
    """Weights after three steps, those of a moving reference too."""
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module, rows = make_module(method, pipeline), 4 // world_size
    prompts = PromptLoaders(PROMPTS, batch_size=rows, seed=2)
    data = {"refl": prompts, "prfl": PromptsAndImages(prompts, Pairs(rows))}.get(method, Pairs(rows))
    trainer.fit(module, datamodule=data)
    changing = changing_names(module)
    return {name: whole_tensor(p.detach()).clone() for name, p in module.named_parameters() if name in changing}


def all_cases(folder: Path) -> dict[str, Any]:
    """Every case with DDP and with FSDP2, on two ranks."""
    source_of("sd15")  # while there is no process group: in one, transformers leaves saving to rank 0
    return {
        f"{name} {method} {pipeline}": train(method, pipeline, STRATEGIES[name](), 2)
        for method, pipeline in CASES
        for name in strategies_of(method)
    }
