"""Callback that reports where a resumed run's settings differ from its checkpoint."""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from latentreward.callbacks.run_progress import total_steps
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from latentreward.alignment.modules.alignment import prompts_of
from latentreward.core.contracts import PathText, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest

logger = logging.getLogger(__name__)

Override = Literal["lr", "schedule", "batch_size", "callbacks"]
"""What a resumed run can take from its settings."""
TUNER_FILES = (".lr_find_", ".scale_batch_size_")
"""Prefixes of the files from which Lightning's tuner restores the state before its search, which is not a resume."""
SEARCHES = (LearningRateFinder.on_fit_start, BatchSizeFinder.on_fit_start)
"""Hooks that search when a run starts, and then restore its state before a resume was complete."""
SAME_SCHEDULE = "give the model.lr_scheduler that it was trained with, or --resume_override=[schedule]"
OWN_RATES = (OneCycleLR, CyclicLR)  # schedules whose own settings give the learning rates, whatever the optimiser's is
SCHEDULE_VALUES = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Entries that schedules add to an optimiser's parameter groups."""


class ResumedSettings(Callback):
    """Callback that makes a resumed run the checkpoint's run, or ends it before a step, and reports other settings.

    Optimiser settings, learning rate schedule and batch size are those of the checkpoint, whatever the settings say,
    unless ``override`` names them. Only checkpoints written with this callback hold the batch size of the data module;
    with other checkpoints the batch size of the settings is used. Other prompts of an alignment are used, with a
    warning. The command line adds this callback to every fit.

    A ``LearningRateFinder`` or ``BatchSizeFinder`` is left out of a resumed run: it searched before the first step.

    Args:
        override: What to take from the settings instead: ``lr``, the learning rate; ``schedule``, the learning rate
            schedule, advanced to the restored step; ``batch_size``, with which the epoch goes on after the same number
            of pairs; ``callbacks``: states of callbacks that the run lacks are dropped.

    Attributes:
        in_force: Values of the checkpoint that replaced values of the settings, by name, such as
            ``model.optimizer.lr``.

    Example:
        ``--resume_override=[lr,schedule]`` on the command line; ``Trainer(callbacks=[ResumedSettings(["lr"])])``.
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
            self._start = next(n for n in count() if not any(written(numbered(path, n)) for path in names))
        return self._start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what tells a resumed run whether it is this one, and what Lightning does not restore."""
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        checkpoint["kind"], checkpoint["start"] = run_kind(trainer), self._start or 0
        if (size := batch_size(trainer)) is not None:
            checkpoint["batch_size"] = size
        if prompts := prompts_digest(trainer):
            checkpoint["prompts"] = prompts

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the batch size before loaders are made, and remove the schedules' state from ``checkpoint``.

        Lightning would load that state into a schedule of any class. :meth:`on_train_start` loads the state instead,
        once the schedules are compared. A later checkpoint, which another callback restores, is no resume.
        """
        tuned = Path(trainer.ckpt_path or "").name.startswith(TUNER_FILES)
        if trainer.state.fn != TrainerFn.FITTING or tuned or self._saved is not None:
            return
        self._saved = {"lr_schedulers": [], "optimizer_states": [], "optimizers": [], **checkpoint}
        self._start, checkpoint["lr_schedulers"] = checkpoint.get("start", 0), []
        self._check_owners(trainer)
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
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._schedules = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        if self._saved is None:
            return
        classes, saved = [type(optimizer).__name__ for optimizer in trainer.optimizers], self._saved["optimizers"]
        if saved not in ([], classes):
            raise InputError(
                f"model.optimizer is {', '.join(classes)}, but the checkpoint holds the state of {', '.join(saved)}; "
                "give the model.optimizer that it was trained with, or start anew"
            )
        groups = [state["param_groups"] for state in self._saved["optimizer_states"]]
        theirs, ours = [
            [[len(group["params"]) for group in groups] for groups in every] for every in (groups, self._groups)
        ]
        if theirs and theirs != ours:
            raise InputError("the checkpoint's optimiser has other parameters; tuning and head must be as in training")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings with the restored state, report differences, and apply the overrides."""
        self.start(trainer)  # before a checkpoint records it
        if self._saved is not None:
            self._check_restored(trainer)
            self._compare_optimizers(trainer)
            if "schedule" not in self.override:
                self._restore_schedules(trainer, self._saved["lr_schedulers"])
            if self.override & {"lr", "schedule"}:
                self._replay(trainer, self._saved["lr_schedulers"])
        end = total_steps(trainer) or 0
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"):
            if 0 < end < (steps := warm_up_steps(scheduler)) and trainer.is_global_zero:
                line = "model.lr_scheduler warms up for %d optimiser steps, and the run ends at step %d; shorten one"
                logger.warning(f"{line}, or lengthen the other", steps, end)
            if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < end:
                override = "" if self._saved is None else " and --resume_override=[schedule]"
                raise InputError(
                    f"model.lr_scheduler: OneCycleLR ends at total_steps={scheduler.total_steps}, before the run's "
                    f"{end} optimiser steps; give --model.lr_scheduler.total_steps {end}{override}"
                )
        self._saved = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the checkpoint's run had already reached its limit, and name the limit to raise."""
        if self._saved is None or not trainer.is_global_zero:  # on_train_start ran, and set it to None
            return
        limits = {
            "max_steps": trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps,
            "max_epochs": trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs,
            "max_time": trainer.should_stop,
        }
        if name := next((name for name, reached in limits.items() if reached), None):
            reached = f"the checkpoint, of optimiser step {trainer.global_step}, has reached trainer.{name}"
            logger.warning("resume: nothing to train: %s; raise it to go on", reached)

    def _check_owners(self, trainer: Trainer) -> None:
        """Leave out searches for settings, and refuse states that no callback of the run takes."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        line = "left out: it searched before the first step, and the checkpoint has its result"
        searches = [one for one in callbacks if type(one).on_fit_start in SEARCHES]
        trainer.callbacks = [one for one in callbacks if one not in searches]  # type: ignore[attr-defined]
        owned, lines = {one.state_key for one in callbacks}, [f"{type(one).__name__} is {line}" for one in searches]
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
            lines.append(f"the state of {key} is dropped, as no callback of this run takes it")
        for line in lines if trainer.is_global_zero else ():
            logger.warning("resume: %s", line)

    def _check_restored(self, trainer: Trainer) -> None:
        """Raise InputError if step, weights or optimiser are no longer the checkpoint's."""
        saved: dict[str, Any] = self._saved or {}
        stepped, undone = any(one["state"] for one in saved["optimizer_states"]), ""
        weights, before = trainer.lightning_module.named_parameters(), saved.get("state_dict", {})
        if trainer.global_step != saved["global_step"]:
            undone = f"stands at optimiser step {trainer.global_step}, not at the checkpoint's {saved['global_step']}"
        elif stepped and not any(one.state for one in trainer.optimizers):
            undone = "has a new optimiser without the checkpoint's state"
        elif changed := [name for name, one in weights if differs(one, before.get(name))]:
            undone = f"has other weights than the checkpoint ({changed[0]})"
        if undone:
            raise InputError(
                f"the resumed run {undone}: a callback changed it before the first step; leave those of "
                "trainer.callbacks that restore a state or load weights out of a resumed run"
            )

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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects steps of the optimiser in between
                for _ in range(steps):
                    config.scheduler.step()
        if trainer.is_global_zero and "schedule" in self.override:
            logger.warning("resume: model.lr_scheduler is the given one, placed at step %d", trainer.global_step)


def log_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's files: its logger's, or the trainer's where the logger names none; collective."""
    folder = trainer.log_dir
    return Path(trainer.default_root_dir if folder in (None, ".") else folder)


def output_path(trainer: Trainer, name: PathText) -> Path:
    """Return where a run writes what is called ``name`` in its folder, beside that of earlier starts; collective."""
    counts = [one.start(trainer) for one in trainer.callbacks if isinstance(one, ResumedSettings)]  # type: ignore[attr-defined]
    return numbered(log_folder(trainer) / name, sum(counts))


def written(path: Path) -> bool:
    """Tell whether a path is a file, or a folder that holds something."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def numbered(path: Path, number: int) -> Path:
    """Return the path itself for the number 0, and ``lora-v1`` for ``lora`` and 1, as Lightning names checkpoints."""
    return path.with_stem(f"{path.stem}-v{number}") if number else path


def run_kind(trainer: Trainer) -> str:
    """Return the class that a run trains; its data may come from another module, such as a cache."""
    classes = type(trainer.lightning_module).__mro__  # FSDP2 puts a class of its own before the module's
    return next(kind.__qualname__ for kind in classes if not issubclass(kind, FSDPModule))


def differs(weight: Tensor, before: Tensor | None) -> bool:
    """Tell whether a trained weight is not as saved; sharded ones are not compared."""
    known = before is not None and weight.requires_grad and not isinstance(weight, DTensor)
    return known and before.shape == weight.shape and not torch.equal(weight.cpu(), before.to("cpu", weight.dtype))


def warm_up_steps(scheduler: LRScheduler) -> float:
    """Return the optimiser steps of the warm-up with which a schedule begins; 0 for none that is known."""
    first: Any = next(iter(getattr(scheduler, "_schedulers", ())), scheduler)
    if isinstance(first, OneCycleLR):
        return first._schedule_phases[0]["end_step"]  # type: ignore[index, no-any-return]
    rises = getattr(first, "start_factor", 1) < getattr(first, "end_factor", 1)
    return first.total_iters if rises else getattr(first, "warmup_steps", 0)


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
