"""Base class of all modules: trainable weights stay float32, and checkpoints record which base model they belong to."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

from latentreward.checkpoints.base_weights import BaseSample, quantized_names
from latentreward.checkpoints.shards import check_weights, frozen_names
from latentreward.encoders.prompts import PromptEncoder
from latentreward.errors import InputError
from latentreward.modules.frozen import refuse_quantized, share_frozen
from latentreward.modules.fsdp1 import FSDP1Precision
from latentreward.modules.optimizers import single_optimizer
from latentreward.modules.schedules import PlateauSteps
from latentreward.seeding import run_seed

UNSEEN = ("quantization", "family")
"""Settings of a base that are not seen in the samples of its weights."""


def unseen_settings(place: str, given: Mapping[str, Any], encoder: PromptEncoder | None) -> dict[str, Any]:
    """Return the settings of a base that are not seen in the samples of its weights, for ``base_settings``.

    ``place`` is the name of the base in the run's settings; ``encoder`` knows the ``t5_length`` that null stands for.
    """
    found = {f"{place}.{name}": given.get(name) for name in UNSEEN}
    if encoder is not None:  # encoders whose tokens are T5's alone have no number of their own for T5
        found[f"{place}.t5_length"] = getattr(encoder, "t5_length", encoder.num_tokens)
    return found


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients; a collective call of all ranks if FSDP2 shards some of them."""
    gradients = [one.grad for one in parameters if one.grad is not None]
    groups = ([one for one in gradients if isinstance(one, DTensor) is sharded] for sharded in (False, True))
    norms = (get_total_norm(group) for group in groups if group)
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in norms]
    return torch.stack(whole).norm() if whole else torch.zeros(())


def warn_of_unreached(module: nn.Module) -> None:
    """Warn in one line of trained weights to which a backward pass gave no gradient, not even zeros."""
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    places = [name.rpartition(".")[0] for name, one in trained.items() if one.grad is None]
    if not places:
        return
    few = ", ".join(f"{name} ({type(module.get_submodule(name)).__name__})" for name in [*dict.fromkeys(places)][:3])
    rank_zero_warn(
        f"{type(module).__name__}: {len(places)} of {len(trained)} trained weights got no gradient in the first step, "
        f"such as those of {few}: what is computed from them is not part of the loss, or detach, item or no_grad cut "
        "it off; freeze weights that are not to train by requires_grad_(False)"
    )


class BasedModule(LightningModule):
    """LightningModule that trains weights on top of a frozen base model.

    Derived classes set :attr:`based_on` in their constructor.

    Args:
        optimizer: Optimiser of the trainable parameters. Vectors and scalars get no weight decay, unless the module
            has ``decay_vectors``.
        lr_scheduler: Learning rate schedule, stepped after each optimiser step; None keeps the rate constant.
        seed: Seed of all random numbers; None takes the run's ``seed_everything``.

    Attributes:
        based_on: Module that holds the base's weights, and the folder or hub id that they come from.
        base_settings: Settings of the base that are not seen in its weights and that a resumed run must not change, by
            the names of the run's settings.
        lr: Learning rate that replaces the optimiser's own; None keeps the optimiser's. Lightning's learning rate
            finder sets this attribute.
        frozen_dtype: Name of the setting that stores frozen weights in bfloat16, for messages.
        decay_vectors: Whether vectors and scalars get weight decay too.
    """

    based_on: tuple[nn.Module, str]
    base_settings: Mapping[str, Any] = {}
    frozen_dtype = "frozen_dtype"
    decay_vectors = False

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, run_seed(seed)
        self.lr: float | None = None
        self._configured_lr: float | None = None
        self._base: BaseSample | None = None
        self._stepped = False

    def setup(self, stage: str) -> None:
        """Check that trainable weights stay float32, in which small updates are not lost.

        Raises:
            InputError: If ``trainer.precision`` is not 32-true, 16-mixed or bf16-mixed, or FSDP1 is to shard quantised
                weights.
        """
        if self.trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise InputError(
                f"trainer.precision={self.trainer.precision}: what trains must be float32; use bf16-mixed (with "
                f"{self.frozen_dtype}: bfloat16 for the frozen weights), 16-mixed or 32-true"
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):
            refuse_quantized(self, "FSDP1")
            strategy.precision_plugin = FSDP1Precision(strategy.precision_plugin, strategy)
        if self._base is None:  # before weights are sharded
            self._base = BaseSample.of(*self.based_on)
            share_frozen(self, self.trainer)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool = True, **kwargs: Any) -> Self:  # type: ignore[override]
        """Build a module from ``kwargs`` and load a checkpoint's weights; see ``LightningModule``.

        By default only tensors and plain values are read, whereas Lightning would unpickle any object. The function
        that a checkpoint names as ``_instantiator`` is not used, because Lightning would import it.
        """
        kwargs["_instantiator"] = None  # has precedence over the checkpoint's
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save :attr:`base_settings`, and leave quantised layers out, which only their library can read."""
        checkpoint["base_settings"] = dict(self.base_settings)
        for name in quantized_names(self):
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this base.

        Quantised layers are filled in from this module's base. So are all frozen weights that the checkpoint leaves
        out, if it is of a quantised run, or outside a Trainer, where ``load_from_checkpoint`` calls this hook.

        Raises:
            InputError: If the checkpoint belongs to another base, or a resumed run has other :attr:`base_settings`.
        """
        if "base" in checkpoint:
            (self._base or BaseSample.of(*self.based_on)).check(checkpoint["base"])
        trained = checkpoint.get("base_settings", {})
        if names := quantized_names(self):
            checkpoint["state_dict"] |= self._own_values(names)
        elif any(
            value and name.endswith("quantization") for name, value in trained.items()
        ):  # which left those layers out
            checkpoint["state_dict"] = {**self._own_values(frozen_names(self)), **checkpoint["state_dict"]}
        try:
            if self.trainer.state.fn == TrainerFn.FITTING:
                self._check_settings(trained)
        except RuntimeError:
            check_weights(self, {name: value.shape for name, value in checkpoint["state_dict"].items()})
            left_out = self._own_values(frozen_names(self)) if "base" in checkpoint else {}
            checkpoint["state_dict"] = {**left_out, **checkpoint["state_dict"]}

    def _own_values(self, names: set[str]) -> dict[str, Any]:
        """Return those of the named entries that ``load_state_dict`` takes: not what a library of quantisation adds."""
        own = (*self.named_parameters(remove_duplicate=False), *self.named_buffers())
        state = self.state_dict()
        return {name: state[name] for name, _ in own if name in names and name in state}

    def _check_settings(self, trained: Mapping[str, Any]) -> None:
        for name, ours in self.base_settings.items():
            theirs = trained.get(name, ours)
            if theirs != ours:
                raise InputError(
                    f"the checkpoint was trained with {name}={theirs}, not {ours}; give {name} as it was, or start a "
                    "new run"
                )

    def configure_optimizers(self) -> Any:
        """Build one optimiser over the trainable parameters, and its schedule, stepped after each optimiser step."""
        self._configured_lr = self.lr
        return single_optimizer(self.parameters(), self.optimizer, self.lr_scheduler, self.decay_vectors, self.lr)

    def on_before_backward(self, loss: Tensor) -> None:
        """Raise InputError for a loss without a gradient, of which PyTorch names no part."""
        if not loss.requires_grad:
            raise InputError(
                f"{type(self).__name__}.training_step returned a loss without a gradient; nothing that is computed "
                "from trained weights may be detached (in a family of your own: velocity, begin and step)"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise InputError if a step returned no loss, for which Lightning skips the step without a word."""
        if self.automatic_optimization and not outputs:
            raise InputError(f"{type(self).__name__}.training_step returned None; it must return the loss")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the learning rate and the norm of all gradients, before clipping, at the steps that are logged.

        The first step warns of trained weights without a gradient. FSDP1, which shards gradients without their shapes,
        has neither.
        """
        if not self._stepped and not isinstance(self.trainer.strategy, FSDPStrategy):
            self._stepped = True
            warn_of_unreached(self)
        if not self.trainer._logger_connector.should_update_logs:  # as LearningRateMonitor asks
            return
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if not isinstance(self.trainer.strategy, FSDPStrategy):
            self.log("train/grad_norm", gradient_norm(self.parameters()))

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that steps a schedule which follows a metric."""
        return [PlateauSteps()]

    def on_fit_start(self) -> None:
        """Rebuild the optimiser and its schedule if the callback ``LearningRateFinder`` has found a learning rate.

        Lightning sets the new rate in the optimiser only; the old schedule would set the old rate at its next step.
        """
        if self.lr != self._configured_lr:
            self.trainer.strategy.setup_optimizers(self.trainer)
