"""Callbacks on checkpoints: what is written when, without frozen weights, with an average, and beside it the LoRA."""

from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks.resumed_settings import output_path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from latentreward.alignment import AlignmentModule, TrainedLoRA
from latentreward.core.checkpoints.files import wrap_saving
from latentreward.core.checkpoints.shards import check_weights, frozen_names, placed_like, whole_tensor
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_at_least_one, check_range, errors_at


class LastCheckpoint(ModelCheckpoint):
    """Callback that writes ``last.ckpt`` every n optimiser steps, at the end of each epoch, and at the end of the run.

    Each save replaces the file of the one before, and no state is written twice. A new run in a folder that has the
    ``last.ckpt`` of an earlier run writes ``last-v1.ckpt``, and so on.

    ``ModelCheckpoint(save_last=True)`` writes each state to two files. With ``every_n_train_steps`` it leaves out the
    end of the run.

    Args:
        every_n_train_steps: Largest number of optimiser steps that a kill or a power cut may lose.
        dirpath: Folder; None takes ``checkpoints`` in the logger's folder.

    Example:
        ``--trainer.callbacks+=LastCheckpoint --trainer.callbacks.every_n_train_steps=250``
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: PathText | None = None) -> None:
        check_at_least_one(every_n_train_steps=every_n_train_steps)
        super().__init__(dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps)

    @property
    @override
    def state_key(self) -> str:
        """Key without ``every_n_train_steps``, so that a run resumed with another interval goes on in its file."""
        return type(self).__qualname__

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save after every n-th optimiser step, and when the run ends within an epoch.

        From there a run with a raised limit takes the other batches of that epoch; from Lightning's later hooks it
        would begin the next epoch. After the last batch of an epoch, :meth:`on_train_epoch_end` saves. Nothing is saved
        between optimiser steps: accumulated gradients would be lost.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        if loop._is_training_done or loop.done:  # in the first batch of a resumed run, `done` waits for a validation
            self._save(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, *args)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, and if the run ends where :meth:`on_train_batch_end` cannot save."""
        self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing; Lightning would save here even under ``fast_dev_run``."""

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class TrainableCheckpoint(Callback):
    """Callback that leaves frozen weights out of checkpoints, and checks that no trainable weight is missing.

    Frozen weights are loaded from the backbone's ``source`` again, so a DiNa-LRM on SD3.5-Medium takes some hundred MB
    instead of 20 GB. A reward module records which base its weights belong to, and refuses a checkpoint of another
    base. During a run the module's ``state_dict()`` holds only the trainable weights, so that frozen weights are not
    even gathered.

    Example:
        ``--trainer.callbacks+=TrainableCheckpoint``
    """

    def __init__(self) -> None:
        self._hook: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.strict_loading = False
        self.teardown(trainer, pl_module, stage)  # of a run that an error ended, perhaps of another module
        self._hook = pl_module.register_state_dict_post_hook(drop_frozen)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the names before weights are loaded; a sharding strategy has checked and loaded them already."""
        if "state_dict" in checkpoint:
            check_weights(pl_module, {name: value.shape for name, value in checkpoint["state_dict"].items()})


def drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Drop frozen weights from a state dict (as a hook); buffers of modules that train stay."""
    for name in frozen_names(module):
        state_dict.pop(prefix + name, None)


class TrainableEMA(Callback):
    """Callback that keeps an exponential moving average of the trainable parameters, in float32, for validation.

    ``average ← decay · average + (1 − decay) · weights`` after each optimiser step. Training uses the raw weights,
    which are restored before a checkpoint is written. The average is saved in the checkpoint, in this callback's state,
    so a resumed run equals an uninterrupted one. ``latentreward consolidate --average=true`` writes a checkpoint whose
    weights are the average.

    Where weights are sharded (FSDP2), the average is sharded too. Rank 0 saves the whole average, so that it can be
    loaded on any number of devices.

    Args:
        decay: In [0, 1); DiNa-LRM's config has 0.995 (arXiv:2602.11146; its released code never applied it).
        warm_up: Whether the decay is limited to (1 + n) / (10 + n) at the n-th step, so that the initial weights fade
            quickly; false uses ``decay`` from the first step, as DiNa-LRM's released code would.

    Note:
        Lightning's ``WeightAveraging`` is not used: it copies the whole module, frozen network included, and a run
        shorter than its start-up ends with the *initial* weights.

    Example:
        ``--trainer.callbacks+=TrainableEMA --trainer.callbacks.decay=0.995``
    """

    def __init__(self, decay: float = 0.995, warm_up: bool = True) -> None:
        check_range("[0, 1)", "DiNa-LRM's config has 0.995", decay=decay)
        self.decay, self.warm_up = decay, warm_up
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._last_step = 0
        self._raw: dict[str, Tensor] = {}

    @staticmethod
    def _trained(pl_module: LightningModule) -> dict[str, Parameter]:
        return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            rank_zero_warn("TrainableEMA: checkpoints with save_weights_only hold the raw weights and no average")

    def _place(self, pl_module: LightningModule) -> dict[str, Parameter]:
        """Place the average on the weights' devices, or start it from the weights; return the trainable weights."""
        weights = self._trained(pl_module)
        if self.average and self.average.keys() != weights.keys():
            raise InputError(
                f"the checkpoint's average lacks or adds {sorted(self.average.keys() ^ weights.keys())[0]}; tuning and "
                "head must be those it was trained with"
            )
        for name, weight in weights.items():
            self.average[name] = placed_like(self.average.get(name, weight.detach()), weight)
        return weights

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._place(pl_module)
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the average once per optimiser step, not per accumulated batch."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        trained = self._trained(pl_module)
        for sharded in (False, True):  # PyTorch mixes no sharded weights with whole ones
            names = [name for name, weight in trained.items() if isinstance(weight, DTensor) is sharded]
            if names:  # in float32: at decay 0.9999 a bfloat16 average would not move; a few kernels for all weights
                weights = [trained[name].float() for name in names]
                torch._foreach_lerp_([self.average[name] for name in names], weights, 1 - decay)

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        for name, weight in self._trained(pl_module).items():
            if name in self._raw:
                weight.copy_(self._raw[name])
        self._raw = {}

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.updates or self._raw:
            return
        weights = self._place(pl_module)
        self._raw = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole average (on rank 0 only) and the number of updates; collective if it is sharded."""
        average = {}
        for name, value in self.average.items():
            whole = whole_tensor(value)
            if not distributed.is_initialized() or distributed.get_rank() == 0:
                average[name] = whole
        return {"average": average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.updates = dict(state_dict["average"]), state_dict["updates"]


class PolicyLoRA(Callback):
    """Callback that writes the policy's adapter as a LoRA with each checkpoint and at the end of training.

    The folder ``lora`` of the run's log folder holds the newest LoRA, or ``lora-v1`` if an earlier run wrote ``lora``.
    ``pipeline.load_lora_weights`` of diffusers loads it, or peft where diffusers has no LoRA loader for the family. The
    file is replaced at once, so a reader always finds a complete one. The LoRA holds the trained weights, not the
    average of ``TrainableEMA``; for the average, run ``latentreward consolidate --average=true`` and then
    ``latentreward export``.

    Args:
        folder: Folder to write to; None takes ``lora`` in the run's log folder.

    Example:
        ``--trainer.callbacks+=PolicyLoRA``
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.output_name = Path("lora") if folder is None else folder.absolute()
        self._written: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the LoRA after each checkpoint, so that a kill leaves none that is ahead of the checkpoints.

        Lightning has no hook after a checkpoint, so the strategy's method that writes it is wrapped.
        """
        if not isinstance(pl_module, AlignmentModule):
            raise InputError(f"PolicyLoRA: a {type(pl_module).__name__} has no policy; use it in alignment alone")
        wrap_saving(trainer.strategy, save_both, self, trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its own method back."""
        vars(trainer.strategy).pop("save_checkpoint", None)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA of the present weights; collective."""
        folder = output_path(trainer, self.output_name)  # a collective call
        with errors_at(f"optimiser step {trainer.global_step}: "):
            lora = TrainedLoRA.of_policy(pl_module.policy)
        if trainer.is_global_zero:
            lora.write(folder)
        self._written = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA of the checkpoint that a run is resumed from, which a kill may have left without its own."""
        if trainer.ckpt_path:
            self.write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the LoRA at the end, also of a run that was complete, unless one of this optimiser step is written."""
        if self._written != trainer.global_step:
            self.write(trainer, pl_module)


def save_both(
    callback: PolicyLoRA, trainer: Trainer, pl_module: LightningModule, save: Any, *args: Any, **options: Any
) -> None:
    """Write a checkpoint by ``save``, and then the LoRA."""
    save(*args, **options)
    callback.write(trainer, pl_module)
