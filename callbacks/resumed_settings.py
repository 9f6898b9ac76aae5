"""Callback that reports where a resumed run's settings differ from its checkpoint."""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from latentreward.callbacks.run_progress import total_steps
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from latentreward.contracts import sources_of
from latentreward.errors import InputError
from latentreward.modules.alignment import prompts_of
from latentreward.storage.digests import digest

logger = logging.getLogger(__name__)

TUNER_FILES = (".lr_find_", ".scale_batch_size_")
"""Prefixes of the files from which Lightning's tuner restores the state before its search, which is not a resume."""
SAME_SCHEDULE = "give the model.lr_scheduler that it was trained with, or --resume_override=[schedule]"
OWN_RATES = (OneCycleLR, CyclicLR)  # schedules whose own settings give the learning rates, whatever the optimiser's is
SCHEDULE_VALUES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Entries that schedules add to an optimiser's parameter groups."""


class ResumedSettings(Callback):
    """Callback that reports which settings of a resumed run differ from what its checkpoint restores.

    Optimiser settings, learning rate schedule and batch size are those of the checkpoint, whatever the settings say,
    unless ``override`` names them. Only checkpoints written with this callback hold the batch size of the data module;
    with other checkpoints the batch size of the settings is used. Other prompts of an alignment are used, with a
    warning. The command line adds this callback to every fit.

    Args:
        override: What to take from the settings instead: ``lr``, the learning rate; ``schedule``, the learning rate
            schedule, advanced to the restored step; ``batch_size``, with which the epoch goes on after the same number
            of pairs.

    Attributes:
        in_force: Values of the checkpoint that replaced values of the settings, by name, such as
            ``model.optimizer.lr``.

    Raises:
        InputError: If the checkpoint's schedule or optimiser is of another class than the given one, or its optimiser
            has other parameters; ``override`` names ``lr`` alone while the schedules differ; a OneCycleLR is shorter
            than the run.

    Example:
        ``--resume_override=[lr,schedule]`` on the command line; ``Trainer(callbacks=[ResumedSettings(["lr"])])``.
    """

    def __init__(self, override: Sequence[Literal["lr", "schedule", "batch_size"]] = ()) -> None:
        self.override = frozenset(override)
        self.in_force: dict[str, Any] = {}
        self._groups: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []
        self._saved_schedules: list[dict[str, Any]] | None = None
        self._saved_groups: list[list[dict[str, Any]]] = []
        self._saved_optimizers: list[str] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the batch size, the optimisers' classes and a digest of the prompts, which Lightning does not save."""
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        if (size := batch_size(trainer)) is not None:
            checkpoint["batch_size"] = size
        if prompts := prompts_digest(trainer):
            checkpoint["prompts"] = prompts

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the batch size before loaders are made, and remove the schedules' state from ``checkpoint``.

        Lightning would load that state into a schedule of any class. :meth:`on_train_start` loads the state instead,
        once the schedules are compared.
        """
        if trainer.state.fn != TrainerFn.FITTING or Path(trainer.ckpt_path or "").name.startswith(TUNER_FILES):
            return
        self._saved_schedules, checkpoint["lr_schedulers"] = checkpoint.get("lr_schedulers", []), []
        self._saved_groups = [state["param_groups"] for state in checkpoint.get("optimizer_states", [])]
        self._saved_optimizers = checkpoint.get("optimizers", [])
        given = batch_size(trainer)
        saved = checkpoint.get("batch_size", given)
        if given != saved:
            self._settle(trainer, "data.batch_size", given, saved, "batch_size")
            if "batch_size" not in self.override:
                trainer.datamodule.batch_size = saved  # type: ignore[attr-defined]
        prompts = prompts_digest(trainer)
        if checkpoint.get("prompts", prompts) != prompts and trainer.is_global_zero:
            logger.warning(
                "resume: data.prompts are others than the checkpoint's: the run goes on at its place in their order, "
                "and its steps differ from the uninterrupted run's; give the earlier prompts, or start anew"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare classes, and remember what the settings made, before Lightning restores optimisers and schedules."""
        classes = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        if self._saved_optimizers not in ([], classes):
            raise InputError(
                f"model.optimizer is {', '.join(classes)}, but the checkpoint holds the state of "
                f"{', '.join(self._saved_optimizers)}; give the model.optimizer that it was trained with, or start anew"
            )
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._schedules = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        theirs, ours = [
            [[len(group["params"]) for group in groups] for groups in every]
            for every in (self._saved_groups, self._groups)
        ]
        if theirs and theirs != ours:
            raise InputError("the checkpoint's optimiser has other parameters; tuning and head must be as in training")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings with the restored state, report differences, and apply the overrides."""
        if self._saved_schedules is not None:
            self._compare_optimizers(trainer)
            if "schedule" not in self.override:
                self._restore_schedules(trainer, self._saved_schedules)
            if self.override & {"lr", "schedule"}:
                self._replay(trainer, self._saved_schedules)
        end = total_steps(trainer) or 0
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"):
            if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < end:
                override = "" if self._saved_schedules is None else " and --resume_override=[schedule]"
                raise InputError(
                    f"model.lr_scheduler: OneCycleLR ends at total_steps={scheduler.total_steps}, before the run's "
                    f"{end} optimiser steps; give --model.lr_scheduler.total_steps {end}{override}"
                )
        self._saved_schedules, self._saved_groups, self._saved_optimizers = None, [], []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the checkpoint's run had already reached its limit, and name the limit to raise."""
        if self._saved_schedules is None or not trainer.is_global_zero:  # on_train_start ran, and set it to None
            return
        limits = {
            "max_steps": trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps,
            "max_epochs": trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs,
            "max_time": trainer.should_stop,
        }
        if name := next((name for name, reached in limits.items() if reached), None):
            reached = f"the checkpoint, of optimiser step {trainer.global_step}, has reached trainer.{name}"
            logger.warning("resume: nothing to train: %s; raise it to go on", reached)

    def _settle(self, trainer: Trainer, name: str, given: Any, saved: Any, override: str | None = None) -> None:
        """Log which of two values of a setting is used, the given or the saved one."""
        if override in self.override:
            line = (
                f"{name} is {given} from here on, {saved} in the checkpoint: steps differ from the uninterrupted run's"
            )
        else:
            self.in_force.setdefault(name, saved)
            remedy = f"; --resume_override=[{override}] takes it" if override else ""
            line = f"{name} stays {saved} as in the checkpoint, not {given} as given{remedy}"
        if trainer.is_global_zero:
            logger.warning("resume: %s", line)

    def _compare_optimizers(self, trainer: Trainer) -> None:
        """Log each optimiser setting that differs between given and restored parameter groups, once."""
        # OneCycleLR and CyclicLR also change momentum or betas at each step: these values are not settings.
        cycled = any(getattr(config.scheduler, "cycle_momentum", False) for config in trainer.lr_scheduler_configs)
        seen = {"betas", "momentum"} if cycled else set()
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for restored, given in zip(optimizer.param_groups, groups, strict=True):
                pairs = {name: (given[name], restored[name]) for name in given.keys() & restored.keys()}
                pairs["lr"] = base_rate(given), base_rate(restored)
                for name in sorted((pairs.keys() & optimizer.defaults.keys()) - seen):
                    ours, theirs = map(plain, pairs[name])
                    if ours != theirs:
                        seen.add(name)
                        self._settle(trainer, f"model.optimizer.{name}", ours, theirs, "lr" if name == "lr" else None)

    def _restore_schedules(self, trainer: Trainer, saved: Sequence[Mapping[str, Any]]) -> None:
        # With ``lr`` alone in ``override``, the settings of the schedules must be the checkpoint's.
        theirs, ours = [list(map(schedule_settings, states)) for states in (saved, self._schedules)]
        if [settings.keys() for settings in theirs] != [settings.keys() for settings in ours]:
            raise InputError(f"the checkpoint holds the state of another learning rate schedule; {SAME_SCHEDULE}")
        for config, state, before, given in zip(trainer.lr_scheduler_configs, saved, theirs, ours, strict=True):
            for name in sorted(before.keys() & setting_names(config.scheduler)):
                if before[name] != given[name]:
                    if "lr" in self.override:
                        raise InputError(
                            f"resume_override=[lr]: model.lr_scheduler.{name} is {given[name]}, but {before[name]} in "
                            f"the checkpoint; {SAME_SCHEDULE}"
                        )
                    self._settle(trainer, f"model.lr_scheduler.{name}", given[name], before[name], "schedule")
            config.scheduler.load_state_dict(state)

    def _replay(self, trainer: Trainer, saved: Sequence[Mapping[str, Any]]) -> None:
        """Step the given schedules from their first step to the restored one, from the learning rates to be used.

        Stepping works for every class of schedule: many compute a learning rate from the previous one.
        """
        own = any(isinstance(config.scheduler, OWN_RATES) for config in trainer.lr_scheduler_configs)
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, given in zip(optimizer.param_groups, groups, strict=True):
                base = base_rate(given if own or "lr" in self.override else group)
                factor = plain(given["lr"]) / plain(base_rate(given)) if plain(base_rate(given)) else 1.0
                cycled = {"betas", "momentum"} if "max_momentum" in group else set()
                for name in SCHEDULE_VALUES:
                    group.pop(name, None)
                group |= {name: given[name] for name in given.keys() & (SCHEDULE_VALUES | cycled)}
                group["lr"] = base * factor  # as the schedule's constructor left it
                if "initial_lr" in given:
                    group["initial_lr"] = base
        for number, (config, fresh) in enumerate(zip(trainer.lr_scheduler_configs, self._schedules, strict=True)):
            config.scheduler.load_state_dict(deepcopy(fresh))
            set_base_rates(config.scheduler)
            taken = trainer.global_step if config.interval == "step" else trainer.current_epoch
            steps = saved[number]["last_epoch"] if number < len(saved) else taken // config.frequency
            if isinstance(config.scheduler, ReduceLROnPlateau):  # follows a metric, so it starts afresh
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects steps of the optimiser in between
                for _ in range(steps):
                    config.scheduler.step()
        if trainer.is_global_zero and "schedule" in self.override:
            logger.warning("resume: model.lr_scheduler is the given one, placed at step %d", trainer.global_step)


def batch_size(trainer: Trainer) -> int | None:
    """Return the batch size of the run's data module; None if there is none."""
    return getattr(getattr(trainer, "datamodule", None), "batch_size", None)


def prompts_digest(trainer: Trainer) -> str:
    """Return a digest of the prompts of an alignment, with the names of the pictures that they edit; empty for none."""
    prompts = prompts_of(trainer)
    parts = (f"{text}\n{[source.image_key for source in sources_of(text)]}\n" for text in prompts)
    return digest(parts) if prompts else ""


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


def set_base_rates(scheduler: LRScheduler) -> None:
    """Set ``base_lrs`` of a schedule, and of schedules nested in it, to each group's rate before any schedule."""
    scheduler.base_lrs = [base_rate(group) for group in scheduler.optimizer.param_groups]
    for inner in getattr(scheduler, "_schedulers", ()):
        set_base_rates(inner)
