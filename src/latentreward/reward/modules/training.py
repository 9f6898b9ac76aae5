"""What training needs beside the science: optimiser and schedule, checks of its steps, the frozen base."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from latentreward.core.checkpoints.base_weights import BaseSample, quantized_names
from latentreward.core.checkpoints.shards import check_weights, frozen_names
from latentreward.core.errors import InputError, check_choices, check_range
from latentreward.core.storage.digests import digest
from latentreward.diffusion.encoders.prompts import PromptEncoder


def unseen_settings(place: str, given: Mapping[str, Any], encoder: PromptEncoder | None) -> dict[str, Any]:
    """Return the settings of a base, ``place`` in the run's, that are not seen in the samples of its weights."""
    found = {f"{place}.{name}": given.get(name) for name in ("quantization", "family")}
    if encoder is not None:  # encoders whose tokens are T5's alone have no number of their own for T5
        found[f"{place}.t5_length"] = getattr(encoder, "t5_length", encoder.num_tokens)
    return found


class FrozenBase:
    """Frozen base model on which a module trains weights.

    Args:
        weights: The module, or its part, that holds the base's weights.
        source: Folder or hub id that they come from.
        settings: Settings that are not seen in the weights and that a resumed run must not change, by name.
        dtype_setting: Name of the setting that stores frozen weights in bfloat16, for messages.
    """

    def __init__(
        self, weights: nn.Module, source: str, settings: Mapping[str, Any], dtype_setting: str = "frozen_dtype"
    ) -> None:
        self.weights, self.source, self.settings, self.dtype_setting = weights, source, settings, dtype_setting
        self._sample: BaseSample | None = None

    @property
    def sample(self) -> BaseSample:
        """Values of the frozen weights: those that :meth:`prepare` sampled before weights were sharded."""
        return self._sample or BaseSample.of(self.weights, self.source)

    def prepare(self, module: LightningModule) -> None:
        """Prepare ``module`` for its trainer, in ``setup``: weights that train stay float32, frozen ones are shared.

        In bfloat16, an update that is small beside its weight would be lost.
        """
        if module.trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise InputError(
                f"trainer.precision={module.trainer.precision}: what trains must be float32; use bf16-mixed (with "
                f"{self.dtype_setting}: bfloat16 for the frozen weights), 16-mixed or 32-true"
            )
        strategy = module.trainer.strategy
        if isinstance(strategy, FSDPStrategy):  # it converts frozen records, and does not clip by norm
            raise InputError("trainer.strategy: FSDP1 is not supported; use fsdp2")
        # Once, in the first stage: afterwards weights are sharded, and a shard's values are no sample of the whole.
        if self._sample is None:
            self._sample = self.sample
            share_frozen(module, module.trainer)

    def save(self, module: nn.Module, checkpoint: dict[str, Any], saved: Collection[str]) -> None:
        """Record the base in a checkpoint of ``module``, as far as frozen weights are not among the ``saved`` names.

        Quantised layers are left out, because only their library can read them.
        """
        # Popped first: what the checkpoint does not hold is recorded as a sample of the base below.
        for name in quantized_names(module):
            checkpoint["state_dict"].pop(name, None)
        checkpoint["base_settings"], checkpoint["base"] = dict(self.settings), self.sample.record(saved)

    def check(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this base, and fill in the weights that it leaves out.

        Quantised layers are filled in from this base. So are all frozen weights that the checkpoint leaves out, if it
        is of a quantised run, or outside a Trainer, where ``load_from_checkpoint`` calls the hook.
        """
        if "base" in checkpoint:
            self.sample.check(checkpoint["base"])
        trained = checkpoint.get("base_settings", {})
        if names := quantized_names(module):
            checkpoint["state_dict"] |= own_values(module, names)
        elif any(value for name, value in trained.items() if name.endswith("quantization")):  # which left them out
            checkpoint["state_dict"] = {**own_values(module, frozen_names(module)), **checkpoint["state_dict"]}
        try:
            fitting = module.trainer.state.fn == TrainerFn.FITTING
        except RuntimeError:  # of a module without a trainer
            check_weights(module, {name: value.shape for name, value in checkpoint["state_dict"].items()})
            left_out = own_values(module, frozen_names(module)) if "base" in checkpoint else {}
            checkpoint["state_dict"] = {**left_out, **checkpoint["state_dict"]}
            return
        for name, ours in self.settings.items() if fitting else ():
            theirs = trained.get(name, ours)
            if theirs != ours:
                trained_with = f"the checkpoint was trained with {name}={theirs}, not {ours}"
                raise InputError(f"{trained_with}; give {name} as it was, or start a new run")


def own_values(module: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Return those of the named entries that ``load_state_dict`` takes: not what a library of quantisation adds."""
    own = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    state = module.state_dict()
    return {name: state[name] for name, _ in own if name in names and name in state}


def share_frozen(module: LightningModule, trainer: Trainer) -> None:
    """Check that all ranks have loaded the same frozen weights, and keep DDP from sending them.

    At its start DDP writes the weights of rank 0 into those of the other ranks. Of weights that are mapped from a file,
    each process would then get a copy of its own. A digest is compared instead. The module must not be wrapped or
    sharded yet.
    """
    if trainer.world_size == 1:
        return
    names = frozen_names(module)
    found = digest(frozen_values(module, names))
    strategy = trainer.strategy
    if not strategy.reduce_boolean_decision(found == strategy.broadcast(found), all=True):
        problem = "the ranks have loaded different frozen weights"
        raise InputError(f"{problem}; give all machines the same files of the base models")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def frozen_values(module: nn.Module, names: set[str]) -> Iterator[memoryview | str]:
    """Yield names and bytes of the named parameters and buffers of a module, in the module's order."""
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if name in names:
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            for part in stored_parts(tensor.detach()):
                yield memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def stored_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors in which a tensor is stored: itself, or codes and scales of torchao's quantised ones."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    yield from [getattr(tensor, name) for name in names] or [tensor]


Decay = Literal["none", "linear", "cosine"]


def single_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    decay_vectors: bool = False,
    lr: float | None = None,
) -> Any:
    """Build one optimiser over the trainable parameters and its schedule, as ``configure_optimizers`` returns them.

    The schedule is stepped after each optimiser step. With ``decay_vectors``, vectors and scalars (biases, norms) get
    the optimiser's weight decay too. ``lr`` is the learning rate before any schedule; None keeps the optimiser's own.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # AdamW decays every parameter of a group; norms, biases and a temperature have no reason to shrink to 0.
    groups: list[dict[str, Any]] = [
        {"params": [one for one in trained if one.ndim > 1 or decay_vectors]},
        {"params": [one for one in trained if not (one.ndim > 1 or decay_vectors)], "weight_decay": 0.0},
    ]
    try:
        built = optimizer([group for group in groups if group["params"]])
    except ValueError as error:
        raise InputError(f"model.optimizer: {error}") from error
    for group in built.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    if lr_scheduler is None:
        return built
    schedule = lr_scheduler(built)
    if isinstance(schedule, ReduceLROnPlateau):  # Lightning steps it after the checkpoint of an epoch is written
        raise InputError("model.lr_scheduler: a ReduceLROnPlateau cannot be resumed; take another, as WarmupSchedule")
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WarmupSchedule(LambdaLR):
    """Learning rate schedule: linear warm-up, then constant, or decay to 0 at ``total_steps``.

    Args:
        optimizer: Optimiser whose learning rate is scheduled.
        warmup_steps: Optimiser steps until the full rate.
        decay: ``none``, ``linear`` or ``cosine``.
        total_steps: Optimiser steps of the run, needed for a decay: ``"${trainer.max_steps}"`` in YAML.

    Note:
        LRM's released schedule counts a step per process and so is nearly constant after warm-up on 8 GPUs; this one
        counts optimiser steps, whatever the number of processes or accumulated batches.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, decay: Decay = "none", total_steps: int | None = None
    ) -> None:
        check_choices(WarmupSchedule, decay=decay)
        check_range("[0, inf)", warmup_steps=warmup_steps)
        if decay != "none" and (total_steps is None or total_steps <= warmup_steps):
            needed = f"decay={decay!r} needs total_steps above warmup_steps={warmup_steps}, got {total_steps}"
            raise InputError(f'{needed}; give the run\'s length, e.g. total_steps: "${{trainer.max_steps}}"')
        self.warmup_steps, self.decay, self.total_steps = warmup_steps, decay, total_steps
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none":
            return 1.0
        left = max(0.0, 1.0 - (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return left if self.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class OptimizerSteps(Callback):
    """Callback of every module: checks and logs its optimiser's steps.

    Logs ``train/lr`` and ``train/grad_norm``, the norm of all gradients before they are clipped.
    """

    def __init__(self) -> None:
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rebuild the optimiser and its schedule if ``LearningRateFinder`` has found a learning rate.

        Lightning sets the new rate in the optimiser only; the old schedule would set the old rate at its next step.
        """
        if pl_module.lr != pl_module.configured_lr:
            trainer.strategy.setup_optimizers(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise InputError for a loss without a gradient, of which PyTorch names no part."""
        if not loss.requires_grad:
            given = f"{type(pl_module).__name__}.training_step returned a loss without a gradient"
            raise InputError(f"{given}; nothing that is computed from trained weights may be detached")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rate and the norm of logged steps; in the first step, warn of unreached weights."""
        if not self._stepped:
            warn_of_unreached(pl_module)
        self._stepped = True
        if not trainer._logger_connector.should_update_logs:  # as LearningRateMonitor asks
            return
        pl_module.log("train/lr", optimizer.param_groups[0]["lr"])
        gradients = [one.grad for one in pl_module.parameters() if one.grad is not None]
        # In two calls: torch refuses to stack the norms of sharded gradients with those of whole ones.
        groups = ([one for one in gradients if isinstance(one, DTensor) is sharded] for sharded in (False, True))
        norms = (get_total_norm(group) for group in groups if group)
        # Under FSDP2 a collective call of all ranks.
        whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in norms]
        pl_module.log("train/grad_norm", torch.stack(whole).norm() if whole else torch.zeros(()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise InputError if a step returned no loss, for which Lightning skips the step without a word."""
        if pl_module.automatic_optimization and not outputs:
            raise InputError(f"{type(pl_module).__name__}.training_step returned None; it must return the loss")


def warn_of_unreached(module: nn.Module) -> None:
    """Warn in one line of trained weights to which a backward pass gave no gradient, not even zeros."""
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    places = [name.rpartition(".")[0] for name, one in trained.items() if one.grad is None]
    if not places:
        return
    few = ", ".join(f"{name} ({type(module.get_submodule(name)).__name__})" for name in [*dict.fromkeys(places)][:3])
    rank_zero_warn(
        f"{type(module).__name__}: {len(places)} of {len(trained)} trained weights got no gradient in the first step, "
        f"such as those of {few}; let the loss depend on them, or freeze them by requires_grad_(False)"
    )
