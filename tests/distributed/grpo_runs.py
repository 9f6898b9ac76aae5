"""Runs of GRPO, NFT, AWM, RAM, DGPO and CRD under watch, the same on one process and, with half the rows, on two."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks import CollapseGuard, HackingMonitor, SampleGrid, TimestepBands
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.optim import SGD

from latentreward.alignment import (
    GDPO,
    AlignmentModule,
    AWMModule,
    Branching,
    ClippedPolicyLoss,
    CRDModule,
    DGPOModule,
    DiffusionNFTModule,
    DiffusionOPSDModule,
    DiversityAdvantage,
    FlowDPPO,
    GRPOGuard,
    GRPOModule,
    MovingWindow,
    NoisiestSteps,
    NormGuard,
    OnPolicyDistillationModule,
    OutcomeProcessLoss,
    PolicySource,
    Pruning,
    RAMModule,
    RankGate,
    RewardGuidance,
    RewardMixture,
    Sampling,
    StateCredit,
    StepwiseGRPOModule,
    StratifiedSteps,
    Teacher,
    TrajectoryGRPOModule,
    TurningPointCredit,
)
from latentreward.alignment.policies.moving_average import DecayRamp
from latentreward.core.checkpoints.shards import changing_names, whole_tensor
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA
from latentreward.reward import CallableScorer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.alignment.modules.toy_rewards import BrightnessSource
from tests.distributed.strategies import STRATEGIES, strategies_of
from tests.tiny_pipelines import source_of

PROMPTS = ["a red circle on a black background", "two blue squares on a white background", "a large green cross"]
KINDS: dict[str, Any] = {
    "stepwise": (StepwiseGRPOModule, {"candidates": Branching(3)}),
    "trajectory": (TrajectoryGRPOModule, {"num_trajectories": 3}),
    "steps": (
        TrajectoryGRPOModule,
        {
            "num_trajectories": 3,
            "sampling": Sampling(4),
            "credit": TurningPointCredit(balanced=True),
            "window": MovingWindow(2, every=1),
            "trust_region": [GRPOGuard(), NormGuard()],
        },
    ),
    "mixture": (
        TrajectoryGRPOModule,
        {
            "num_trajectories": 3,
            "advantage": GDPO([1.0, 0.5]),
            "trust_region": [RankGate(), FlowDPPO()],
            "optimizer": partial(SGD, lr=1.0),
        },
    ),
    "euphonium": (
        TrajectoryGRPOModule,
        {
            "num_trajectories": 3,
            "sampling": Sampling(3, flow_noise="dance", noise_level=0.25),
            "reward_guidance": RewardGuidance(scale=0.5, high=1000.0),
            "advantage": DiversityAdvantage(),
            "credit": StateCredit(),
            "loss": OutcomeProcessLoss(clip_range=1e-2, kl_weight=0.1),
            "optimizer": partial(SGD, lr=1.0),
        },
    ),
    "nft": (DiffusionNFTModule, {"num_samples": 3, "old": DecayRamp(0.5, 0.5)}),
    "awm": (AWMModule, {"num_samples": 3, "steps": StratifiedSteps(1, share=1.0), "optimizer": partial(SGD, lr=1.0)}),
    "ram": (RAMModule, {"num_samples": 3, "draws": 2}),
    "dgpo": (DGPOModule, {"num_samples": 3, "steps": NoisiestSteps(2), "optimizer": partial(SGD, lr=1.0)}),
    "crd": (CRDModule, {"num_samples": 3, "average": DecayRamp(0.5, 0.5)}),
    "pruned": (DiffusionNFTModule, {"num_samples": 3, "old": DecayRamp(0.5, 0.5), "pruning": Pruning(6, 1)}),
    "opd": (OnPolicyDistillationModule, {}),
    "opsd": (DiffusionOPSDModule, {"old": DecayRamp(0.5, 0.5)}),
}
REWARDS: dict[str, Any] = {
    "opd": [Teacher(guidance_scale=3.0)],  # in place of a reward
    "opsd": BrightnessSource(),
    "mixture": RewardMixture([FirstChannelReward(), BrightnessSource()], normalise="none"),
    "euphonium": RewardMixture([BrightnessSource(), BrightnessSource()], [1.0, 0.5], normalise="none"),
}
CASES = [
    ("stepwise", "sd15"),
    ("trajectory", "sd35_tiny"),
    ("steps", "sd35_tiny"),
    ("mixture", "sd35_tiny"),
    ("euphonium", "sd35_tiny"),
    ("nft", "sd35_tiny"),
    ("awm", "sd35_tiny"),
    ("ram", "sd15"),
    ("dgpo", "sd35_tiny"),
    ("crd", "sd35_tiny"),
    ("pruned", "sd35_tiny"),
    ("opd", "sd35_tiny"),
    ("opsd", "sd35_tiny"),
]
METRICS = ("hacking/held_out", "hacking/reward_change", "collapse/diversity", "rollout/gap_50_t_0_1000")


def redness(prompts: Any, images: list[Image.Image]) -> Tensor:
    return torch.tensor([sum(image.getchannel("R").tobytes()) / 1e4 for image in images])


def make_module(method: str, pipeline: str) -> AlignmentModule:
    options: dict[str, Any] = {"sampling": Sampling(3), "seed": 1, "optimizer": partial(SGD, lr=0.05)}
    kind, own = KINDS[method]
    if issubclass(kind, GRPOModule):
        options |= {"loss": ClippedPolicyLoss(clip_range=1e-2, kl_weight=0.1), "guidance_scale": 2.0}
    policy = PolicySource(source_of(pipeline), lora=LoRA(rank=4, alpha=4))
    reward = REWARDS.get(method, FirstChannelReward())
    return kind(policy, reward, **{**options, **deepcopy(own)})  # a gate adapts


def train(method: str, pipeline: str, strategy: Any, world_size: int, folder: Path) -> dict[str, Any]:
    """Weights and last metrics after three steps."""
    monitors = [
        SampleGrid(PROMPTS, every_n_steps=2, image_size=32),
        HackingMonitor(PROMPTS, CallableScorer(redness, name="redness"), every_n_steps=3, action="warn"),
        CollapseGuard(PROMPTS, every_n_steps=3, images_per_prompt=2, least=0.01),
        TimestepBands((0, 1000)),
    ]
    if method == "opd":  # has no reward
        monitors = [one for one in monitors if not isinstance(one, HackingMonitor)]
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=monitors,
        use_distributed_sampler=False,
    )
    module = make_module(method, pipeline)
    rows = 8 // world_size
    data = PromptLoaders(PROMPTS, batch_size=rows, prompts_per_rollout=4 // world_size, batches_per_epoch=9, seed=2)
    trainer.fit(module, datamodule=data)
    changing = changing_names(module)
    weights = {name: whole_tensor(p.detach()).clone() for name, p in module.named_parameters() if name in changing}
    logged = trainer.callback_metrics  # DiffusionOPSD scores no samples of a rollout
    return {"weights": weights, "metrics": {name: logged[name].item() for name in METRICS if name in logged}}


def all_cases(folder: Path) -> dict[str, Any]:
    """Every case with DDP and with FSDP2, on two ranks."""
    source_of("sd15")  # while there is no process group: in one, transformers leaves saving to rank 0
    return {
        f"{name} {method}": train(method, pipeline, STRATEGIES[name](), 2, folder / name / method)
        for method, pipeline in CASES
        for name in strategies_of(method)
    }
