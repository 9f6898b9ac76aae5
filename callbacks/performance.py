"""Callbacks of speed and size: faster steps with a table of their phases, pairs a second, and a table of parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from latentreward.callbacks.step_times import StepTimes, listen, unlisten
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from latentreward.alignment import Policy
from latentreward.core.checkpoints.base_weights import is_quantized
from latentreward.core.contracts import layout_of
from latentreward.core.errors import InputError, check_at_least_one, check_range
from latentreward.core.peak_rates import Limits, find_limits
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.compilation import compile_blocks, uncompile_blocks
from latentreward.diffusion.encoders.vae import LatentEncoder

WORTH_COMPILING, WORTH_COMPILING_LAYERS = 200, 2500
"""Optimiser steps that earn back the compilation of a transformer's blocks and of a U-Net's layers: on an H200
0.5 to 1.6 and 2 to 5 minutes, for steps 0.08 to 1.2 and 0.05 s shorter (docs/performance.md)."""
LAYERS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers that do most of the work in U-Nets and VAEs. Their blocks of several layers compile slowly."""

PROCESS_FLAGS = (
    ("cudnn_benchmark", torch.backends.cudnn, "benchmark"),
    ("tf32", torch.backends.cuda.matmul, "allow_tf32"),
    ("tf32", torch.backends.cudnn, "allow_tf32"),
)
"""Switches that are flags of the process: name, backend of PyTorch, and name of its flag."""


class Performance(Callback):
    """Callback of every ``fit`` that switches on what makes steps faster at equal results, within rounding.

    A switch that is null is chosen: on a CUDA device blocks are compiled if the run is long enough, and otherwise the
    kernels of LoRA are fused; on other devices nothing changes. The choice is one line at the start, and stands in the
    run's ``config.yaml``. Only training, and the validation within it, change. ``test``, ``score`` and ``serve``
    compute without these switches, because they promise equal scores for any batch.

    Logged steps have ``time/step``, the mean seconds of an optimiser step since the last logged one, without validation
    and checkpoints, and its parts: ``time/data_wait``, ``encode``, ``rollout``, ``reward``, ``forward``, ``backward``,
    ``optimizer`` (with clipping), ``ema`` and ``log`` (all else). ``train/tflops_per_second`` is of one process, and
    ``train/mfu`` its share of the card's peak. See :class:`~latentreward.callbacks.step_times.StepTimes`.

    Args:
        auto: False leaves switches off that are null.
        compile_blocks: Compile the blocks of networks that train, sample or score with ``torch.compile``. What PyTorch
            cannot compile is computed as before, and a warning says so.
        channels_last: Store the weights of convolutions with channels last. Null is false: measured slower.
        cudnn_benchmark: Let cuDNN time its convolutions for each new shape, for a few fixed image sizes. Null is
            false: measured no faster.
        tf32: Multiply what stays float32 in TF32, of 10 bits. Null is false: measured no faster with bf16-mixed.
        fused_optimizer: Update all weights in a few kernels, with optimisers of PyTorch that can. Null is false:
            measured no faster than PyTorch's own choice, ``foreach``.
        fused_lora: Add the products of LoRA to the outputs of their layers in one kernel. Null is true on a CUDA device
            if blocks are not compiled; compiled ones fuse more.
        peak_tflops: Peak of the device in 10¹² operations per second, for ``train/mfu``. Null takes that of the card's
            name and the trainer's precision; other devices have no ``train/mfu``.

    Attributes:
        chosen: Switches in force, by name, once a run has started.
        limits: Peak rates of the CUDA device once training has started; None if they are not known.

    Example:
        ``--performance.compile_blocks=true``, or ``--performance.auto=false`` for eager code.
    """

    def __init__(
        self,
        auto: bool = True,
        compile_blocks: bool | None = None,
        channels_last: bool | None = None,
        cudnn_benchmark: bool | None = None,
        tf32: bool | None = None,
        fused_optimizer: bool | None = None,
        fused_lora: bool | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        check_range("(0, inf)", peak_tflops=peak_tflops)
        self.auto, self.peak_tflops = auto, peak_tflops
        self.times: StepTimes | None = None
        self.limits: Limits | None = None
        self._step = 0
        self._flags_before: list[tuple[Any, str, bool]] = []
        self.chosen = {
            "compile_blocks": compile_blocks,
            "channels_last": channels_last,
            "cudnn_benchmark": cudnn_benchmark,
            "tf32": tf32,
            "fused_optimizer": fused_optimizer,
            "fused_lora": fused_lora,
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the switches that are null, and apply them to a module whose weights are not sharded yet."""
        if stage != "fit":
            return
        quantized = any(is_quantized(weight) for weight in pl_module.parameters())
        if self.chosen["compile_blocks"] and quantized:
            raise InputError(
                "performance.compile_blocks: true, but quantised layers cannot be compiled; remove it, or quantization"
            )
        cuda, blocks = trainer.strategy.root_device.type == "cuda", [*blocks_of(pl_module)]
        steps = float("inf") if trainer.max_steps < 0 else trainer.max_steps
        long = steps >= worth_compiling(blocks) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.chosen["compile_blocks"] is None:
            self.chosen["compile_blocks"] = self.auto and cuda and bool(blocks) and not quantized and long
        if self.chosen["fused_lora"] is None:
            adapted = not quantized and any("lora_A." in name for name, _ in pl_module.named_parameters())
            self.chosen["fused_lora"] = self.auto and cuda and adapted and not self.chosen["compile_blocks"]
        self.chosen = {name: bool(value) for name, value in self.chosen.items()}
        if cuda or any(self.chosen.values()):
            on = ", ".join(name for name, value in self.chosen.items() if value)
            rank_zero_info(f"performance: {on or 'no switch'} on (docs/performance.md)")
        self.apply(pl_module)

    def apply(self, module: nn.Module) -> None:
        """Apply the switches to the networks of a module, and to this process."""
        if self.chosen["fused_lora"]:
            from latentreward.diffusion.backbones.fused_lora import fuse_lora  # peft takes seconds of a command's start

            if not fuse_lora(module):
                rank_zero_warn("performance.fused_lora: true, but no plain linear layer has LoRA; nothing is fused")
        if self.chosen["compile_blocks"]:
            compile_blocks(blocks_of(module))
        if self.chosen["channels_last"]:
            for part in module.modules():
                if isinstance(part, nn.Conv2d):  # in Conv3d and Linear the format has another or no meaning
                    part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
        for switch, backend, flag in PROCESS_FLAGS:
            if self.chosen[switch]:
                with suppress(RuntimeError):  # read where the process uses torch's fp32_precision too
                    self._flags_before.append((backend, flag, getattr(backend, flag)))
                setattr(backend, flag, True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure, and let optimisers of PyTorch that know ``fused`` use it, if set; others stay.

        A resumed run has by now the optimiser's state of its checkpoint, whose groups may say otherwise.
        """
        device = trainer.strategy.root_device
        if device.type == "cuda":
            card, tf32 = torch.cuda.get_device_name(device), torch.backends.cuda.matmul.allow_tf32
            self.limits = find_limits(card, trainer.precision, tf32)
        peak = self.peak_tflops or (self.limits and self.limits.tflops)
        self.times, self._step = StepTimes(device.type == "cuda", peak), trainer.global_step
        listen(trainer.profiler, self.times)  # type: ignore[attr-defined]
        for optimizer in trainer.optimizers if self.chosen["fused_optimizer"] else ():
            for group in optimizer.param_groups:
                if "fused" in group:
                    group["foreach"], group["fused"] = False, True
                    for weight in group["params"]:  # the others count their steps on the CPU
                        if "step" in (state := optimizer.state.get(weight, {})):
                            state["step"] = state["step"].to(weight.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count the operations of some batches."""
        if self.times is not None:
            with suppress(RuntimeError):  # tensors of a user's batch may have no shape, such as nested ones
                self.times.start_counting(layout_of(batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the means of the optimiser steps since the last logged one."""
        if self.times is None:
            return
        self.times.stop_counting()
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.times.end_step()
            self.times.read()
            if trainer._logger_connector.should_update_logs and self.times.steps:  # as LearningRateMonitor asks
                pl_module.log_dict(self.times.values())
                self.times.restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out of the steps' time."""
        if self.times is not None:
            self.times.stop_counting()
            self.times.pause(True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the steps' time."""
        if self.times is not None:
            self.times.pause(False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the measurement."""
        if self.times is not None:
            self.times.stop_counting()
            unlisten(trainer.profiler)  # type: ignore[attr-defined]
            self.times = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo compiled blocks, fused LoRA and flags: what follows a ``fit`` promises equal scores for any batch."""
        while self._flags_before:
            setattr(*self._flags_before.pop())
        if self.chosen["compile_blocks"]:
            uncompile_blocks(blocks_of(pl_module))
        if self.chosen["fused_lora"]:
            from latentreward.diffusion.backbones.fused_lora import unfuse_lora

            unfuse_lora(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the measurement; Lightning calls no ``teardown`` after an error."""
        self.on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")


def worth_compiling(blocks: Iterable[nn.Module]) -> int:
    """Return the number of optimiser steps from which compiled ``blocks`` take less time than eager ones."""
    return WORTH_COMPILING_LAYERS if any(type(block).__name__ in LAYERS for block in blocks) else WORTH_COMPILING


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is compiled: the blocks of all backbones and policies in a module; of U-Nets and VAEs their layers."""
    for part in module.modules():
        blocks = [*part.blocks()] if isinstance(part, DiffusionBackbone | Policy) else []
        for block in [part] if isinstance(part, LatentEncoder) else blocks:
            layers = [layer for layer in block.modules() if type(layer).__name__ in LAYERS]
            yield from layers or ([] if block is part else [block])


class Throughput(Callback):
    """Callback that logs training speed and the share of time spent waiting for data.

    The values are ``train/pairs_per_second`` (in an alignment rows or prompts), over all ranks, and
    ``train/data_wait``. Validation time is left out. A ``data_wait`` above a few per cent means that more loader
    workers would help.

    Args:
        every_n_batches: Batches per measurement; values are logged after each.

    Example:
        ``--trainer.callbacks+=Throughput --trainer.callbacks.every_n_batches=20``
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        check_at_least_one(every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._restart()

    def _restart(self) -> None:
        self._waiting = self._working = 0.0
        self._pairs = self._batches = 0
        self._since = perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the measurement, with each epoch and after a validation inside one."""
        self._restart()

    on_validation_end = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch ended as waiting for data."""
        now = perf_counter()
        # Lightning fetches the next batch between these two hooks.
        self._waiting, self._since = self._waiting + now - self._since, now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count the batch, and log after every ``every_n_batches`` batches."""
        now = perf_counter()
        self._working, self._since = self._working + now - self._since, now
        rows = next(iter(batch.values())) if isinstance(batch, Mapping) else batch  # such as prompts, and images
        self._pairs, self._batches = self._pairs + len(rows), self._batches + 1
        if self._batches < self.every_n_batches:
            return
        elapsed = self._waiting + self._working
        pl_module.log_dict(
            {
                "train/pairs_per_second": trainer.world_size * self._pairs / elapsed,
                "train/data_wait": self._waiting / elapsed,
            }
        )
        self._restart()


class ParameterSummary(ModelSummary):
    """Callback that prints one line: the number of parameters of each part of the model, and how many are trainable.

    The line replaces Lightning's table, whose FLOPs are 0 without an ``example_input_array``. The command line adds
    this callback to every fit, unless ``trainer.callbacks`` has a ``ModelSummary`` or ``trainer.enable_model_summary``
    is false.

    Args:
        max_depth: Levels of nested modules to list; 0 switches the line off.

    Example:
        ``--trainer.callbacks+=ParameterSummary --trainer.callbacks.max_depth=2``
    """

    def __init__(self, max_depth: int = 1) -> None:
        super().__init__(max_depth)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the line on rank 0; Lightning's ``ModelSummary`` calls this method with the columns of its table."""
        columns = dict(summary_data)
        rows = zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
        parts = [f"{name} ({kind}) {number.strip()}" for name, kind, number in rows if number.strip() != "0"]
        trained, total = (get_human_readable_count(n).strip() for n in (trainable_parameters, total_parameters))
        rank_zero_info(f"parameters: {', '.join(parts)}; {trained} of {total} train; {model_size:,.0f} MB")
