"""Entry point of ``fit --estimate``: builds the module without weights and computes the costs of a training step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer

from latentreward.alignment import PolicySource
from latentreward.alignment.rewards.http import RemoteReward
from latentreward.alignment.rewards.pixel import ImageReward
from latentreward.apps.estimate.batches import largest_batch, written_caches
from latentreward.apps.estimate.rewards import replace_rewards
from latentreward.apps.estimate.shapes import ConfigSources
from latentreward.apps.estimate.step_costs import TEXT, StepCosts, step_costs

ASSUMED = (
    "Computed from shapes, nothing measured: GB are 10⁹ bytes, TFLOP 10¹² operations of matrix products, convolutions "
    "and attention. One process; not counted are data loading, callbacks, validation, kernels' work space and what the "
    "allocator holds beyond tensors."
)


@dataclass(frozen=True)
class Estimate:
    """Memory and computation that a run of ``fit`` needs."""

    costs: StepCosts  # memory and computation of a training step
    settings: Namespace  # settings of the run
    notes: tuple[str, ...]  # lines on what the numbers assume
    limits: str = ""  # what bounds a step on a card; empty without a card that is known

    @property
    def accumulated(self) -> int:
        """Number of batches per optimiser step."""
        return self.settings.trainer.accumulate_grad_batches

    def remedy(self) -> str:
        """Name the settings that lower the peak, of whatever takes most of it."""
        costs = self.costs
        if costs.peak == costs.rollout_peak:
            at_once = " or --model.prompts_at_once" if "prompts_at_once" in self.settings.model.init_args else ""
            return f"take a smaller --data.prompts_per_rollout{at_once}"
        if costs.peak == costs.batch_peak and costs.saved > costs.peak / 4:
            return (
                "take a smaller --data.batch_size and more --trainer.accumulate_grad_batches, or gradient_checkpointing"
            )
        return "store frozen weights in bfloat16 (frozen_dtype) or quantised (quantization), or train a lora"

    def as_text(self) -> str:
        """Format the estimate as tables of weights, memory and computation, with the notes below."""
        costs = self.costs
        lines = [f"{'weights':<38}{'million':>10}{'trained':>10}{'GB':>10}"]
        for part in costs.parts:
            millions = f"{part.parameters / 1e6:>10.1f}{part.trained / 1e6:>10.1f}"
            lines.append(f"  {part.name:<36}{millions}{gigabytes(part.bytes)}")
        memory = {
            "weights": costs.weights,
            "weights before the first step": costs.start if costs.freed else 0,
            "gradients": costs.gradients,
            f"optimiser state ({costs.optimizer})": costs.state,
            "kept for the backward pass": costs.saved,
            "peak in a rollout": costs.rollout_peak,
            "peak in the passes of a batch": costs.batch_peak,
            "peak in the optimiser's update": costs.update_peak,
            "peak": costs.peak,
        }
        lines += ["", f"{'memory':<58}{'GB':>10}"]
        lines += [f"  {name:<56}{gigabytes(value)}" for name, value in memory.items() if value]
        step = self.accumulated * (costs.forward + costs.backward)
        computation = {
            "rollout": costs.rollout,
            "forward pass of a batch": costs.forward,
            "backward pass of a batch": costs.backward,
            f"optimiser step of {self.accumulated} batch{'es' if self.accumulated > 1 else ''}, rollouts aside": step,
        }
        lines += ["", f"{'computation':<58}{'TFLOP':>10}"]
        lines += [f"  {name:<56}{value / 1e12:>10.3g}" for name, value in computation.items() if value]
        return "\n".join([*lines, "", *([self.limits, ""] if self.limits else []), *self.notes, ASSUMED])


def gigabytes(size: int) -> str:
    """Format a size in bytes as GB, in ten characters."""
    return f"{size / 1e9:>10.3f}" if size < 1e9 else f"{size / 1e9:>10.2f}"


def estimate(settings: Namespace, build: Callable[[Namespace], LightningModule]) -> Estimate:
    """Compute the memory and computation that a run of ``fit`` needs.

    ``settings.model`` is changed in place; ``build`` makes the module from settings.

    Raises:
        InputError: If a model's configs are not found on this machine, or the module's class is not supported.
    """
    with TemporaryDirectory(prefix="latentreward-") as folder:
        sources, gpu = ConfigSources(Path(folder)), settings.trainer.accelerator != "cpu"
        module = unread_module(settings, build, sources)
        callbacks = [str(callback.get("class_path")) for callback in settings.trainer.get("callbacks") or []]
        averaged = any(name.endswith(".TrainableEMA") for name in callbacks)
        costs = step_costs(module, settings.data, settings.trainer.accumulate_grad_batches, gpu, averaged)
    notes = notes_on(settings, costs, sources, gpu)
    for part in module.modules():
        if isinstance(part, RemoteReward):
            notes.append(f"Not counted: the work of the reward server {part.source.server.url}.")
        if isinstance(part, ImageReward):
            left_out = f"weights and computation of {type(part.scorer).__name__}"
            notes.append(f"Not counted: {left_out}; decoding of the images that it scores is counted.")
    if any(name.endswith(".EncodeOnce") for name in callbacks):
        kept = costs.without(TEXT)
        notes.append(f"EncodeOnce frees text encoders of {kept.freed / 1e9:.2f} GB before the first step.")
        costs = kept
    return Estimate(costs, settings, tuple(notes))


def unread_module(
    settings: Namespace, build: Callable[[Namespace], LightningModule], sources: ConfigSources
) -> LightningModule:
    """Build the module on the meta device, with a CPU trainer of the configured precision attached."""
    arguments = settings.model.init_args
    sources.replace(arguments)
    if isinstance(policy := arguments.get("policy"), Namespace):
        replace_rewards(arguments, PolicySource(**vars(policy)), sources)
    with torch.device("meta"):
        module = build(settings)
    told = logging.getLogger("lightning.pytorch")
    level = told.level
    told.setLevel(logging.WARNING)  # hides its lines about the devices found
    try:
        module.trainer = Trainer(
            accelerator="cpu", devices=1, precision=settings.trainer.precision, logger=False,
            gradient_clip_val=settings.trainer.gradient_clip_val,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    finally:
        told.setLevel(level)
    module.setup("fit")
    return module


def notes_on(settings: Namespace, costs: StepCosts, sources: ConfigSources, gpu: bool) -> list[str]:
    """Return lines on what the tables assume: module, device, batch size, rollout, strategy, origin of configs."""
    trainer = settings.trainer
    device = "a GPU" if gpu else "the CPU"
    data, name = settings.data.init_args, settings.model.class_path.rpartition(".")[2]
    notes = [f"{name} on {device}, precision {trainer.precision or '32-true'}."]
    sampling = settings.model.init_args.get("sampling") or {}
    given = data.get("size") or (sampling.get("height"), sampling.get("width"))
    sides = given if isinstance(given, int) else None if None in given else " x ".join(map(str, given))
    size = f"images of {sides}" if sides else "the network's own size unless the settings say another"
    if cache := written_caches(data).get("train"):
        (height, width), _ = largest_batch(settings.data, cache.images.sizes(), cache.images.frames, cache.latent_space)
        size = f"images of {height} x {width}, whose batches are the cache's largest"
    notes.append(f"Batch size per process {data.get('batch_size')}, {size}.")
    if costs.rollout_peak:
        notes.append(f"A rollout is of {data.prompts_per_rollout} prompts.")
    elif costs.rollout:
        notes.append("Rollout means sampling without gradients, here up to the latest stop of model.stop_range.")
    strategy = str(trainer.strategy)
    if "fsdp" in strategy.lower():
        notes.append("Counted as if one process held all: FSDP shares weights, gradients and optimiser state out.")
    elif gpu and trainer.devices not in (1, "1"):
        notes.append(f"With several processes, DDP's buckets take {costs.gradients / 1e9:.2f} GB more.")
    notes += [f"Configs of {source}: {origin}." for source, origin in sources.used.items()]
    return notes
