"""``fit --estimate``: a module without weights, costs of a training step, and what a training needs against a card."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer

from latentreward.alignment import PolicySource
from latentreward.alignment.rewards.http import RemoteReward
from latentreward.alignment.rewards.pixel import ImageReward
from latentreward.apps.estimate.step_costs import TEXT, StepCosts, largest_batch, step_costs, written_caches
from latentreward.apps.estimate.unread import ConfigSources, replace_rewards
from latentreward.core.errors import InputError, check_range

ASSUMED = (
    "Computed from shapes, nothing measured: GB are 10⁹ bytes, TFLOP 10¹² operations of matrix products, convolutions "
    "and attention. One process; not counted are data loading, callbacks, validation, kernels' work space and what the "
    "allocator holds beyond tensors."
)


GB = 10**9
ALLOWANCE, CONTEXT = 1.1, GB
"""Factor for what the allocator holds beyond tensors, and bytes of a CUDA context and kernels' work space."""
IMPORTS = 2 * GB  # memory of a process with all its imports and data loaders
KEPT_ROWS = 0.5  # share of a rollout's rows that pass the threshold of LPO; a guess, since it depends on the reward


@dataclass(frozen=True)
class Estimate:
    """Memory and computation that a run of ``fit`` needs."""

    costs: StepCosts  # memory and computation of a training step
    settings: Namespace  # settings of the run
    notes: tuple[str, ...]  # lines on what the numbers assume

    @property
    def accumulated(self) -> int:
        """Number of batches per optimiser step."""
        return self.settings.trainer.accumulate_grad_batches

    def smaller(self) -> Iterator[tuple[str, Any]]:
        """List settings that may lower the peak, those that keep the result first.

        A setting that the run has no place for, or has already, is left out.
        """
        costs, model, data = self.costs, self.settings.model.init_args, self.settings.data.init_args

        def change(name: str, to: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
            """List one setting, by its name and its value now."""
            *path, last = name.split(".")
            place: Any = {"model": model, "data": data}
            for step in path:
                place = (place or {}).get(step)
                place = place.get("init_args", place) if isinstance(place, Namespace) else place
            if place is not None and last in place and (value := to(place[last])) != place[last] and value is not None:
                yield name, value

        def half(now: Any) -> Any:
            return now // 2 if isinstance(now, int) and now > 1 else None

        if costs.peak == costs.rollout_peak:
            yield from change("model.reward.batch_size", lambda now: half(now) if now else 8)
            yield from change("model.prompts_at_once", lambda now: half(now) if now else 1)
            yield from change("data.prompts_per_rollout", half)
            yield from change("model.num_samples", half)
        if costs.peak == costs.batch_peak:
            for owner in ("model.policy", "model.backbone"):
                yield from change(f"{owner}.gradient_checkpointing", lambda now: True)
            yield from change("data.batch_size", half)
        for owner in ("model.policy", "model.backbone"):
            yield from change(f"{owner}.frozen_dtype", lambda now: "bfloat16")
            yield from change(f"{owner}.quantization", lambda now: now or "nf4")

    def as_text(self) -> str:
        """Format the estimate as tables of weights, memory and computation, with the notes below."""
        costs = self.costs
        lines = [f"{'weights':<38}{'million':>10}{'trained':>10}{'GB':>10}"]
        for part in costs.parts:
            millions = f"{part.parameters / 1e6:>10.1f}{part.trained / 1e6:>10.1f}"
            lines.append(f"  {part.name:<36}{millions}{gigabytes(part.bytes):>10}")
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
        step = self.accumulated * (costs.forward + costs.backward)
        computation = {
            "rollout": costs.rollout,
            "forward pass of a batch": costs.forward,
            "backward pass of a batch": costs.backward,
            f"optimiser step of {self.accumulated} batch{'es' if self.accumulated > 1 else ''}, rollouts aside": step,
        }
        lines += ["", f"{'memory':<58}{'GB':>10}"]
        lines += [f"  {name:<56}{gigabytes(value):>10}" for name, value in memory.items() if value]
        lines += ["", f"{'computation':<58}{'TFLOP':>10}"]
        lines += [f"  {name:<56}{value / 1e12:>10.3g}" for name, value in computation.items() if value]
        return "\n".join([*lines, "", *self.notes, ASSUMED])


def gigabytes(size: int) -> str:
    """Format a size in bytes as GB."""
    return f"{size / GB:.3f}" if size < GB else f"{size / GB:.2f}"


def estimate(settings: Namespace, build: Callable[[Namespace], LightningModule]) -> Estimate:
    """Compute what a run of ``fit`` needs; ``settings.model`` is changed in place, and ``build`` makes the module."""
    with TemporaryDirectory(prefix="latentreward-") as folder:
        sources, gpu = ConfigSources(Path(folder)), settings.trainer.accelerator != "cpu"
        try:
            module = unread_module(settings, build, sources)
        except InputError as error:  # names of the models, not the folder that goes with this command
            raise InputError(str(error).replace(f"{folder}/", "")) from error
        costs = step_costs(module, settings.data, settings.trainer.accumulate_grad_batches, gpu)
    notes = notes_on(settings, costs, sources, gpu)
    for part in module.modules():
        if isinstance(part, RemoteReward):
            notes.append(f"Not counted: the work of the reward server {part.images.connection.server.url}.")
        if isinstance(part, ImageReward):
            left_out = f"weights and computation of {type(part.scorer).__name__}"
            notes.append(f"Not counted: {left_out}; decoding of the images that it scores is counted.")
    if any(str(one.get("class_path")).endswith(".EncodeOnce") for one in settings.trainer.get("callbacks") or []):
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
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    finally:
        told.setLevel(level)
    module.setup("fit")
    return module


def notes_on(settings: Namespace, costs: StepCosts, sources: ConfigSources, gpu: bool) -> list[str]:
    """Return lines on what the tables assume."""
    trainer, data = settings.trainer, settings.data.init_args
    name, device = settings.model.class_path.rpartition(".")[2], "a GPU" if gpu else "the CPU"
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


@dataclass(frozen=True)
class Card:
    """Device with which an estimate compares the needs of a training; options of ``fit``.

    Attributes:
        gpu: Whether the training runs on a GPU.
        card_gb: Memory of the card to compare with, in GB of 10⁹ bytes: a card sold as 24 GB, which are 24 · 2³⁰ bytes,
            has 25.7. By default that of the GPU here.
        tflops: Operations per second that the device sustains, in 10¹²; 30 is some 40 % of an RTX 3090's peak.
    """

    gpu: bool
    card_gb: float | None = None
    tflops: float = 30.0

    def __post_init__(self) -> None:
        check_range("(0, inf)", card_gb=self.card_gb, tflops=self.tflops)

    def memory(self) -> float | None:
        """Return the memory of the GPU, or that is free for a run on the CPU, in GB; None without a GPU to ask."""
        if not self.gpu:
            told = Path("/proc/meminfo")
            lines = told.read_text().splitlines() if told.is_file() else []
            free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
            return (free[0] if free else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / GB
        if self.card_gb is None and torch.cuda.is_available():
            return float(torch.cuda.get_device_properties(0).total_memory / GB)
        return self.card_gb

    def needed(self, found: Estimate) -> float:
        """Return the memory in GB that a training needs of the device."""
        factor, more = (ALLOWANCE, CONTEXT) if self.gpu else (1.0, IMPORTS)
        return (found.costs.peak * factor + more) / GB

    def hours(self, found: Estimate) -> str:
        """Tell how long a training takes, without data, validation and pictures."""
        costs, trainer, data = found.costs, found.settings.trainer, found.settings.data.init_args
        whole, rows = trainer.max_steps > 0, (data.get("batch_size") or 1) * found.accumulated
        steps = trainer.max_steps if whole else 1000
        rollouts = steps * found.accumulated  # of ReFL: the sampling of each batch
        if costs.rollout_rows:
            kept = KEPT_ROWS if "selection" in found.settings.model.init_args else 1.0
            rollouts = math.ceil(steps * rows / (costs.rollout_rows * kept))
        flops = steps * found.accumulated * (costs.forward + costs.backward) + rollouts * costs.rollout
        hours = flops / (self.tflops * 1e12) / 3600
        told = f"{hours:.2g} hours" if hours < 72 else f"{hours / 24:.2g} days"
        length = f"{steps} steps{'' if whole else ', the length of the run is open'}"
        return f"time: {told} for {length} (computed, at --tflops {self.tflops:g})"


def compare(found: Estimate, card: Card, again: Callable[[Sequence[str]], Estimate]) -> str:
    """Compare what a training needs with the device, if there is one to ask; return lines on memory and time.

    If it does not fit, settings are tried by ``again``, which estimates the training with further arguments, until it
    does.

    Raises:
        InputError: If the training does not fit; the line ends with the settings with which it does.
    """
    here, size, kind = card.memory(), card.needed(found), "GPU memory" if card.gpu else "memory"
    counted = f"the peak and {IMPORTS / GB:.1f} GB for the program itself"
    if card.gpu:
        counted = f"the peak, {ALLOWANCE - 1:.0%} more and {CONTEXT / GB:.1f} GB for CUDA"
    if here is None:
        counted += "; no GPU is here to compare with, --card_gb 24 takes a card of 24 GB"
        return f"memory: {size:.1f} GB of {kind} (counted: {counted})\n{card.hours(found)}"
    told = f"memory: {size:.1f} of {here:.1f} GB of {kind}"
    if size <= here:
        return f"{told} (counted: {counted})\n{card.hours(found)}"
    chosen: list[str] = []
    while card.needed(found) > here:
        tried = ([*chosen, f"--{name}={value}"] for name, value in found.smaller())
        for more in tried:
            trial = again(more)
            print(f"tried {more[-1]}: {card.needed(trial):.1f} GB", flush=True)
            if trial.costs.peak < 0.98 * found.costs.peak:
                chosen, found = more, trial
                break
        else:
            raise InputError(f"{told} (counted: {counted}); no setting that was tried makes it fit")
    last = {one.partition("=")[0]: one for one in chosen}.values()
    remedy = f"it fits with {' '.join(last)}: {card.needed(found):.1f} GB, {card.hours(found)}"
    raise InputError(f"{told} (counted: {counted}); {remedy}")
