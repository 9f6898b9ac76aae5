"""Callback of speed: faster steps, with seconds of their phases in the log."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from latentreward.alignment import Policy
from latentreward.core.checkpoints.base_weights import is_quantized
from latentreward.core.errors import InputError
from latentreward.core.running import LISTENER, PHASES
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.compilation import compile_blocks, uncompile_blocks
from latentreward.diffusion.encoders.vae import LatentEncoder

WORTH_COMPILING, WORTH_COMPILING_LAYERS = 200, 2500
"""Optimiser steps that earn back the compilation of a transformer's blocks and of a U-Net's layers: on an H200
0.5 to 1.6 and 2 to 5 minutes, for steps 0.08 to 1.2 and 0.05 s shorter (docs/performance.md)."""
LAYERS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers that do most of the work in U-Nets and VAEs. Their blocks of several layers compile slowly."""
ASIDE = "aside"
"""Phase of what belongs to no step: validations and checkpoints."""


class Performance(Callback):
    """Callback of every ``fit`` that makes steps faster at equal results, within rounding, and logs where time goes.

    A switch that is null is chosen: on a CUDA device blocks are compiled if the run is long enough, and otherwise the
    kernels of LoRA are fused; on other devices nothing changes. The choice is one line at the start, and stands in the
    run's ``config.yaml``. Only training, and the validation within it, change. ``test``, ``score`` and ``serve``
    compute without these switches, because they promise equal scores for any batch.

    Logged steps have ``time/step``, the mean seconds of an optimiser step since the last logged one, without validation
    and checkpoints, and its parts: ``time/data_wait``, ``encode``, ``rollout``, ``reward``, ``forward``, ``backward``,
    ``optimizer`` (with clipping), ``ema`` and ``log`` (all else).

    Args:
        auto: False leaves switches off that are null.
        compile_blocks: Compile the blocks of networks that train, sample or score with ``torch.compile``. What PyTorch
            cannot compile is computed as before, and a warning says so.
        fused_lora: Add the products of LoRA to the outputs of their layers in one kernel. Null is true on a CUDA device
            if blocks are not compiled; compiled ones fuse more.

    Attributes:
        chosen: Switches in force, by name, once a run has started.

    Example:
        ``--performance.compile_blocks=true``, or ``--performance.auto=false`` for eager code.
    """

    def __init__(self, auto: bool = True, compile_blocks: bool | None = None, fused_lora: bool | None = None) -> None:
        self.auto, self.chosen = auto, {"compile_blocks": compile_blocks, "fused_lora": fused_lora}
        self.times: StepTimes | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        quantized = any(is_quantized(weight) for weight in pl_module.parameters())
        if self.chosen["compile_blocks"] and quantized:
            raise InputError(
                "performance.compile_blocks: true, but quantised layers cannot be compiled; remove it, or quantization"
            )
        cuda, blocks = trainer.strategy.root_device.type == "cuda", [*blocks_of(pl_module)]
        steps = float("inf") if trainer.max_steps < 0 else trainer.max_steps
        layers = any(type(block).__name__ in LAYERS for block in blocks)
        least = WORTH_COMPILING_LAYERS if layers else WORTH_COMPILING
        long = steps >= least and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.chosen["compile_blocks"] is None:
            self.chosen["compile_blocks"] = self.auto and cuda and bool(blocks) and not quantized and long
        if self.chosen["fused_lora"] is None:
            adapted = not quantized and any("lora_A." in name for name, _ in pl_module.named_parameters())
            self.chosen["fused_lora"] = self.auto and cuda and adapted and not self.chosen["compile_blocks"]
        if cuda or any(self.chosen.values()):
            on = ", ".join(name for name, value in self.chosen.items() if value)
            rank_zero_info(f"performance: {on or 'no switch'} on (docs/performance.md)")
        self.apply(pl_module)

    def apply(self, module: nn.Module) -> None:
        """Switch on what is chosen."""
        if self.chosen["fused_lora"]:
            from latentreward.diffusion.backbones.fused_lora import fuse_lora  # peft takes seconds of a command's start

            if not fuse_lora(module):
                rank_zero_warn("performance.fused_lora: true, but no plain linear layer has LoRA; nothing is fused")
        if self.chosen["compile_blocks"]:
            compile_blocks(blocks_of(module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times, self._step = StepTimes(trainer.strategy.root_device.type == "cuda"), trainer.global_step
        listen(trainer.profiler, self.times)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.times is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            self.times.end_step()
            self.times.read()
            if trainer._logger_connector.should_update_logs and self.times.steps:  # as LearningRateMonitor asks
                pl_module.log_dict(self.times.values())
                self.times.restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.times is not None:
            self.times.pause(True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.times is not None:
            self.times.pause(False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.times is not None:
            unlisten(trainer.profiler)  # type: ignore[attr-defined]
            self.times = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo compiled blocks and fused LoRA: what follows a ``fit`` promises equal scores for any batch."""
        if self.chosen["compile_blocks"]:
            uncompile_blocks(blocks_of(pl_module))
        if self.chosen["fused_lora"]:
            from latentreward.diffusion.backbones.fused_lora import unfuse_lora

            unfuse_lora(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the measurement; Lightning calls no ``teardown`` after an error."""
        self.on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is compiled: the blocks of all backbones and policies in a module; of U-Nets and VAEs their layers."""
    for part in module.modules():
        blocks = [*part.blocks()] if isinstance(part, DiffusionBackbone | Policy) else []
        for block in [part] if isinstance(part, LatentEncoder) else blocks:
            layers = [layer for layer in block.modules() if type(layer).__name__ in LAYERS]
            yield from layers or ([] if block is part else [block])


class Mark(NamedTuple):
    """Beginning of a phase: seconds of the host's clock, or an event of the card."""

    phase: str
    time: Any
    ends_step: bool


class StepTimes:
    """Seconds by phase of training steps, from the beginning of a run.

    On a CUDA device each change of phase records an event, which costs some microseconds. Events are read when the
    card has passed them, so that nothing waits for the card. Elsewhere the host's clock is read. The phases follow each
    other without a gap: together they take the time of the steps, validations and checkpoints left out.
    """

    def __init__(self, cuda: bool) -> None:
        self.open, self.pid = ["log"], os.getpid()  # phases, of which the innermost counts
        self.cuda, self.paused = cuda, False
        self._marks: deque[Mark] = deque()
        self._present: defaultdict[str, float] = defaultdict(float)  # seconds of the step that has not ended
        self._mark()
        self.restart()

    def restart(self) -> None:
        """Forget the steps that have ended."""
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase, of the steps that have ended since then
        self.steps = 0

    def begin(self, name: str) -> None:
        """Begin a phase within the present one."""
        self.open.append(name)
        self._mark()

    def end(self) -> None:
        """End the innermost phase."""
        if len(self.open) > 1:  # else of an action that began before the measurement
            self.open.pop()
            self._mark()

    def pause(self, paused: bool) -> None:
        """Begin or end a part of the run that belongs to no step."""
        self.paused = paused
        self._mark()

    def end_step(self) -> None:
        """End an optimiser step."""
        self._mark(ends_step=True)

    def _mark(self, ends_step: bool = False) -> None:
        name = ASIDE if self.paused else self.open[-1]
        if ends_step or not self._marks or self._marks[-1].phase != name:
            now: Any = torch.cuda.Event(enable_timing=True) if self.cuda else perf_counter()
            if self.cuda:
                now.record()
            self._marks.append(Mark(name, now, ends_step))

    def read(self) -> None:
        """Add up the time between the marks that the device has passed."""
        while len(self._marks) > 1 and (not self.cuda or self._marks[1].time.query()):
            begun, ended = self._marks.popleft(), self._marks[0]
            self._present[begun.phase] += (
                begun.time.elapsed_time(ended.time) / 1000 if self.cuda else ended.time - begun.time
            )
            if ended.ends_step:
                self._present.pop(ASIDE, None)
                for name in [*self._present]:
                    self.seconds[name] += self._present.pop(name)
                self.steps += 1

    def values(self) -> dict[str, float]:
        """Return the mean seconds of a step and of its phases since :meth:`restart`, by the names of the log."""
        means = {name: self.seconds[name] / self.steps for name in PHASES if name in self.seconds}
        return {f"time/{name}": mean for name, mean in {**means, "step": sum(means.values())}.items()}


@cache
def phase_of(action: str) -> str | None:
    """Return the phase that begins with an action of Lightning's profiler; None if the phase goes on."""
    place, _, hook = action.rpartition(".")
    if hook in ("train_dataloader_next", "batch_to_device"):
        return "data_wait"
    if place.startswith("[Callback]"):
        return "ema" if place.startswith("[Callback]TrainableEMA") else "log"
    if place.startswith("[Strategy]"):
        return {"training_step": "forward", "backward": "backward"}.get(hook)
    return {"optimizer_step": "optimizer", "save_checkpoint": ASIDE}.get(hook)


def listen(profiler: Profiler, times: StepTimes) -> None:
    """Let ``times`` follow the actions that Lightning tells its profiler, and the phases that a step names."""

    def start(own: Callable[[str], None], action: str) -> None:
        own(action)
        if (name := phase_of(action)) is not None:
            times.begin(name)

    def stop(own: Callable[[str], None], action: str) -> None:
        own(action)
        if phase_of(action) is not None:
            times.end()

    profiler.start = partial(start, profiler.start)  # type: ignore[method-assign]
    profiler.stop = partial(stop, profiler.stop)  # type: ignore[method-assign]
    LISTENER.set(times)


def unlisten(profiler: Profiler) -> None:
    """Undo :func:`listen`."""
    LISTENER.set(None)
    for name in ("start", "stop"):
        vars(profiler).pop(name, None)
