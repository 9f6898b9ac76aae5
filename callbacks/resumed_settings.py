"""Callback that reports where a resumed run's settings differ from its checkpoint."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any, Literal

from latentreward.callbacks.run_progress import total_steps
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError

logger = logging.getLogger(__name__)

Override = Literal["lr", "batch_size", "callbacks"]
"""What a resumed run can take from its settings."""
TAKEN_BY: dict[str, Override] = {
    "data.batch_size": "batch_size",
    "model.optimizer.lr": "lr",
    "model.lr_scheduler": "lr",
}
"""Setting, or where it stands -> what takes the given value; without an entry the checkpoint's stays."""
SCHEDULE_VALUES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Entries that schedules add to an optimiser's parameter groups."""


class ResumedSettings(Callback):
    """Callback that makes a resumed run the checkpoint's run, or ends it before a step, and reports other settings.

    Optimiser settings, learning rate schedule and batch size are those of the checkpoint, whatever the settings say,
    unless ``override`` names them. Only checkpoints written with this callback hold the batch size of the data module;
    with other checkpoints the batch size of the settings is used. The command line adds this callback to every fit.

    Args:
        override: What to take from the settings instead: ``lr``, the learning rate and its schedule, advanced to the
            restored step; ``batch_size``, with which the epoch goes on after the same number of pairs; ``callbacks``:
            states of callbacks that the run lacks are dropped.

    Attributes:
        in_force: Values of the checkpoint that replaced values of the settings, by name, such as
            ``model.optimizer.lr``.

    Example:
        ``--resume_override=[lr,batch_size]`` on the command line; ``Trainer(callbacks=[ResumedSettings(["lr"])])``.
    """

    def __init__(self, override: Sequence[Override] = ()) -> None:
        self.override = frozenset(override)
        self.in_force: dict[str, Any] = {}
        self._groups: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []
        self._saved: dict[str, Any] | None = None  # the checkpoint of a resumed run, until the first step
        self._start: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run of this process."""
        self._saved, self._start = None, None

    def start(self, trainer: Trainer) -> int:
        """Return which start in the run's folder this is, counted by files; a resumed run is its checkpoint's."""
        if self._start is None:
            folder, callbacks = log_folder(trainer), trainer.callbacks  # type: ignore[attr-defined]
            names = [folder / one.output_name for one in callbacks if hasattr(one, "output_name")]
            places = ([numbered(path, number) for path in names] for number in count())  # a folder may be empty
            taken = (any(one.is_file() or any(one.glob("*")) for one in paths) for paths in places)
            self._start = next(number for number, used in enumerate(taken) if not used)
        return self._start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what tells a resumed run whether it is this one, and what Lightning does not restore."""
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        checkpoint["kind"], checkpoint["start"] = run_kind(trainer), self._start or 0
        if (size := batch_size(trainer)) is not None:
            checkpoint["batch_size"] = size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the batch size before loaders are made, and remove the schedules' state from ``checkpoint``.

        Lightning would load that state into a schedule of any class. :meth:`on_train_start` loads the state instead,
        once the schedules are compared. What a tuner restores after its search is no resume.
        """
        tuned = Path(trainer.ckpt_path or "").name.startswith((".lr_find_", ".scale_batch_size_"))
        if trainer.state.fn != TrainerFn.FITTING or tuned:
            return
        self._saved = {"lr_schedulers": [], **checkpoint}
        self._start, checkpoint["lr_schedulers"] = checkpoint.get("start", 0), []
        self._check_callbacks(trainer)
        given = batch_size(trainer)
        saved = checkpoint.get("batch_size", given)
        if given != saved:
            self._settle(trainer, "data.batch_size", given, saved)
            if "batch_size" not in self.override:
                trainer.datamodule.batch_size = saved  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare classes, and remember what the settings made, before Lightning restores optimisers and schedules."""
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._schedules = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        classes = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        saved = (self._saved or {}).get("optimizers", classes)
        if saved != classes:
            raise InputError(
                f"model.optimizer is {', '.join(classes)}, but the checkpoint holds the state of {', '.join(saved)}; "
                "give the model.optimizer that it was trained with, or start anew"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings with the restored state, report differences, and apply the overrides."""
        self.start(trainer)  # before a checkpoint records it
        if self._saved is not None:
            self._restore(trainer, self._saved["lr_schedulers"])
            mark_in_tensorboard(trainer)
        end = total_steps(trainer) or 0
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"):
            if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < end:
                override = "" if self._saved is None else " and --resume_override=[lr]"
                raise InputError(
                    f"model.lr_scheduler: OneCycleLR ends at total_steps={scheduler.total_steps}, before the run's "
                    f"{end} optimiser steps; give --model.lr_scheduler.total_steps {end}{override}"
                )
        self._saved = None

    def _check_callbacks(self, trainer: Trainer) -> None:
        """Refuse states that no callback of the run takes, and searches, which would undo what is restored."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for one in callbacks:
            if isinstance(one, LearningRateFinder | BatchSizeFinder):
                raise InputError(f"trainer.callbacks: {type(one).__name__} has searched; leave it out of a resumed run")
        owned = {one.state_key for one in callbacks}
        for key, state in self._saved["callbacks"].items():  # type: ignore[index]
            # A Timer is that of trainer.max_time. A ModelCheckpoint that monitors nothing only knows its next file.
            if key in owned or not state or key == "Timer" or state.get("monitor", "") is None:
                continue
            # One that saves at other times has another key; its best checkpoints are those of this run from here on.
            if "callbacks" not in self.override and "best_model_path" not in state:
                raise InputError(
                    f"the checkpoint holds the state of {key}, which no callback of this run takes; give "
                    "trainer.callbacks as in training, or --resume_override=[callbacks] to drop the state"
                )
            tell(trainer, f"the state of {key} is dropped, as no callback of this run takes it")

    def _restore(self, trainer: Trainer, saved: Sequence[Mapping[str, Any]]) -> None:
        """Restore the schedules, or replay the given ones, and say which settings differ."""
        replaced, configs = "lr" in self.override, trainer.lr_scheduler_configs
        theirs, ours = ([schedule_settings(one) for one in states] for states in (saved, self._schedules))
        if not replaced and [one.keys() for one in theirs] != [one.keys() for one in ours]:
            raise InputError(
                "the checkpoint holds the state of another learning rate schedule; give the model.lr_scheduler that it "
                "was trained with, or --resume_override=[lr]"
            )
        # OneCycleLR and CyclicLR also change momentum or betas at each step: these values are not settings.
        cycled = any(getattr(config.scheduler, "cycle_momentum", False) for config in configs)
        told = {f"model.optimizer.{name}" for name in (("betas", "momentum") if cycled else ())}
        for name, given, before in self._compared(trainer, [] if replaced else theirs, ours):
            if given != before and name not in told:
                told.add(name)
                self._settle(trainer, name, given, before)
        if replaced:
            self._replay(trainer, saved)
            return
        for config, state in zip(configs, saved, strict=True):
            config.scheduler.load_state_dict(state)

    def _compared(
        self, trainer: Trainer, theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, Any, Any]]:
        """Yield name, given and saved value of the settings of optimisers, group by group, and schedules."""
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for restored, given in zip(optimizer.param_groups, groups, strict=True):
                pairs = {name: (given[name], restored[name]) for name in given.keys() & restored.keys()}
                pairs["lr"] = base_rate(given), base_rate(restored)
                for name in sorted(pairs.keys() & optimizer.defaults.keys()):
                    yield f"model.optimizer.{name}", *map(plain, pairs[name])
        for config, before, now in zip(trainer.lr_scheduler_configs, theirs, ours, strict=bool(theirs)):
            for name in sorted(before.keys() & setting_names(config.scheduler)):
                yield f"model.lr_scheduler.{name}", now[name], before[name]

    def _settle(self, trainer: Trainer, name: str, given: Any, saved: Any) -> None:
        """Say which of two values of a setting is used, the given or the saved one."""
        override = TAKEN_BY.get(name) or TAKEN_BY.get(".".join(name.split(".")[:2]))
        if override in self.override:
            line = (
                f"{name} is {given} from here on, {saved} in the checkpoint: steps differ from the uninterrupted run's"
            )
        else:
            self.in_force.setdefault(name, saved)
            remedy = f"; --resume_override=[{override}] takes it" if override else ""
            line = f"{name} stays {saved} as in the checkpoint, not {given} as given{remedy}"
        tell(trainer, line)

    def _replay(self, trainer: Trainer, saved: Sequence[Mapping[str, Any]]) -> None:
        """Step the given schedules from their first step to the restored one, from the given learning rates.

        Stepping works for every class of schedule: many compute a learning rate from the previous one.
        """
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, given in zip(optimizer.param_groups, groups, strict=True):
                cycled = {"betas", "momentum"} if "max_momentum" in group else set()
                for name in SCHEDULE_VALUES:
                    group.pop(name, None)
                group |= {name: given[name] for name in given.keys() & ({"lr"} | SCHEDULE_VALUES | cycled)}
        for number, (config, fresh) in enumerate(zip(trainer.lr_scheduler_configs, self._schedules, strict=True)):
            config.scheduler.load_state_dict(deepcopy(fresh))
            taken = trainer.global_step if config.interval == "step" else trainer.current_epoch
            steps = saved[number]["last_epoch"] if number < len(saved) else taken // config.frequency
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects steps of the optimiser in between
                for _ in range(steps):
                    config.scheduler.step()  # type: ignore[call-arg]  # ReduceLROnPlateau is refused
            tell(trainer, f"model.lr_scheduler is the given one, placed at step {trainer.global_step}")


def tell(trainer: Trainer, line: str) -> None:
    """Log a line about a resumed run, on global rank 0."""
    if trainer.is_global_zero:
        logger.warning("resume: %s", line)


def mark_in_tensorboard(trainer: Trainer) -> None:
    """Let TensorBoard drop the points after the present step, which the interrupted run has logged and this one will.

    Points of this very step stay: a validation or a monitor may have logged them before the checkpoint.
    """
    for log in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(log, TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            mark = Event(step=trainer.global_step + 1, session_log=SessionLog(status=SessionLog.START))
            log.experiment.file_writer.add_event(mark)


def log_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's files: its logger's, or the trainer's where the logger names none; collective."""
    folder = trainer.log_dir
    return Path(trainer.default_root_dir if folder in (None, ".") else folder)


def output_path(trainer: Trainer, name: PathText) -> Path:
    """Return where a run writes what is called ``name`` in its folder, beside that of earlier starts; collective."""
    counts = [one.start(trainer) for one in trainer.callbacks if isinstance(one, ResumedSettings)]  # type: ignore[attr-defined]
    return numbered(log_folder(trainer) / name, sum(counts))


def numbered(path: Path, number: int) -> Path:
    """Return the path itself for the number 0, and ``lora-v1`` for ``lora`` and 1, as Lightning names checkpoints."""
    return path.with_stem(f"{path.stem}-v{number}") if number else path


def run_kind(trainer: Trainer) -> str:
    """Return the class that a run trains; its data may come from another module, such as a cache."""
    classes = type(trainer.lightning_module).__mro__  # FSDP2 puts a class of its own before the module's
    return next(kind.__qualname__ for kind in classes if not issubclass(kind, FSDPModule))


def batch_size(trainer: Trainer) -> int | None:
    """Return the batch size of the run's data module; None if there is none."""
    return getattr(getattr(trainer, "datamodule", None), "batch_size", None)


def base_rate(group: Mapping[str, Any]) -> Any:
    """Return the learning rate of an optimiser's parameter group before any schedule."""
    return group.get("initial_lr", group["lr"])


def plain(value: Any) -> Any:
    """Return an optimiser's setting with tensors turned into numbers or lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def schedule_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public values of a schedule's state by name; those of nested schedules as ``schedulers.0.NAME``."""
    values = {name: value for name, value in state.items() if not name.startswith("_")}
    for number, inner in enumerate(state.get("_schedulers", ())):
        values |= {f"schedulers.{number}.{name}": value for name, value in schedule_settings(inner).items()}
    if "_milestones" in state:
        values["milestones"] = state["_milestones"]
    # MultiStepLR keeps its milestones in a Counter.
    return {name: sorted(value.elements()) if isinstance(value, Counter) else value for name, value in values.items()}


def setting_names(scheduler: LRScheduler) -> set[str]:
    """Return the names in :func:`schedule_settings` that are constructor arguments; other values are progress."""
    names = set(signature(type(scheduler)).parameters) - {"last_epoch", "verbose"}
    for number, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        names |= {f"schedulers.{number}.{name}" for name in setting_names(inner)}
    return names
