"""Trained rewards on disk, as their training leaves them, and the states that they score."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import latentreward.reward
from latentreward.alignment import Policy, PolicySource
from latentreward.core.checkpoints.base_weights import BaseSample
from latentreward.core.checkpoints.shards import frozen_names
from latentreward.core.contracts import NoisyStates
from latentreward.diffusion import LoRA
from latentreward.reward import RewardModule
from tests.alignment.modules.batches import MODULES, dina
from tests.diffusion.backbones.networks import FACTORIES, T5_LENGTH
from tests.tiny_pipelines import LATENTS, pipeline_folder

PROMPTS = ("a cat", "two dogs")
HEADS = {
    "lrm": {"class_path": "CLIPProjectionHead"},
    "dina": {"class_path": "GatedQFormerHead", "init_args": {"num_heads": 2}},
    "drm": {"class_path": "DRMHead", "init_args": {"widths": [8, 16], "groups": 4, "hidden": 8}},
    "layer_mix": {"class_path": "LayerMixHead", "init_args": {"width": 8}},
    "two_axes": {"class_path": "LayerMixHead", "init_args": {"width": 8, "axes": [0.25, 0.75]}},
    "pavrm": {"class_path": "PAVRMHead", "init_args": {"num_heads": 2, "widths": [8]}},
}


def of_settings(settings: dict[str, Any]) -> Any:
    """The function that makes a head from a feature spec."""
    return partial(getattr(latentreward.reward, settings["class_path"]), **settings["init_args"])


def backbone_options(name: str, **options: Any) -> dict[str, Any]:
    """What ``tests.diffusion.backbones.networks.tiny_backbone`` sets, for a config."""
    taps = {"visual_taps": [1, 3], "text_taps": [1, 3], "t5_length": T5_LENGTH} if name in ("sd3", "sd35") else {}
    return {"source": pipeline_folder(name), **taps, **options}


def write_run(
    folder: Path, method: str, name: str, whole: bool = False, average: bool = False, **options: Any
) -> RewardModule:
    """A run's ``config.yaml`` and ``reward.ckpt`` in ``folder``; returns the module with the weights they stand for.

    Args:
        folder: Is made.
        method: Name in :data:`HEADS`.
        name: Pipeline of the backbone.
        whole: Whether the checkpoint has frozen weights too.
        average: Whether the weights are those of a moving average, and the checkpoint's own are others.
        options: Of the backbone.
    """
    lora = {"lora": LoRA(**options["lora"])} if "lora" in options else {}
    head = {} if method in MODULES else {"head": of_settings(HEADS[method])}
    module = MODULES.get(method, dina)(name, backbone={**options, **lora}, **head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    base = BaseSample.of(module, module.model.backbone.source).record(state if whole else ())
    if not whole:
        frozen = frozen_names(module)
        state = {key: value for key, value in state.items() if key not in frozen}
    callbacks = {}
    if average:
        trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        callbacks["TrainableEMA"] = {"average": trained, "updates": 7}
        state |= {name: torch.zeros_like(value) for name, value in trained.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": state, "base": base, "callbacks": callbacks, "exif": "ignore"}
    torch.save(content, folder / "reward.ckpt")
    backbone = {"class_path": FACTORIES[name], "init_args": backbone_options(name, **options)}
    settings = {"class_path": type(module).__name__, "init_args": {"backbone": backbone, "head": HEADS[method]}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "model": settings}))
    module.model.eval().requires_grad_(False)
    return module


def tiny_policy(name: str, **options: Any) -> Policy:
    """A policy on a tiny pipeline, its adapter changed from its start."""
    options = {"lora": LoRA(2, 4.0), "t5_length": T5_LENGTH, **options}
    policy = PolicySource(pipeline_folder(name), **options).load()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def states_of(policy: Policy, levels: tuple[float, ...] = (0.9, 0.5, 0.3, 0.1)) -> NoisyStates:
    """Random states at some noise levels, the prompts in turn."""
    latents = torch.randn(len(levels), 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(5))
    timesteps = policy.noise_process.timesteps_at(torch.tensor(levels))
    return NoisyStates(latents, timesteps, torch.arange(len(levels)) % len(PROMPTS))


def scores_by(module: RewardModule, states: NoisyStates) -> Tensor:
    """What the trained module itself gives states of its own noise process."""
    model = module.model
    conditioning, uncond = model.encode_prompts(PROMPTS)
    return model(states.latents, states.timesteps, conditioning.select(states.rows), uncond)
