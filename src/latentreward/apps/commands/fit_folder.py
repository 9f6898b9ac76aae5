"""The folder of a run: which setting names it, what an earlier run left there, and what a run has written."""

import os
import re
from collections.abc import Iterator
from itertools import count, filterfalse
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from latentreward.callbacks import PolicyLoRA, SampleGrid, ScoredPairGrid
from latentreward.callbacks.graceful_stop import fallback_folder
from latentreward.callbacks.resumed_settings import log_folder, output_path
from latentreward.core.checkpoints.files import checkpoint_problem, holds_weights_alone, newest_intact
from latentreward.core.errors import InputError, tell
from latentreward.core.storage.durable import check_writable

FOLDER = "trainer.default_root_dir"
"""Setting that names the folder of a run."""


class MetricsWriter(ExperimentWriter):
    """Writer of a ``CSVLogger``: to ``metrics.csv``, or to ``metrics-v1.csv`` and so on beside an earlier command's.

    Lightning's writer deletes the file of an earlier command, even before a command that logs nothing.
    """

    @override
    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning would delete the file here."""

    @override
    def save(self) -> None:
        """Write what was logged; the first time, choose a file that does not exist."""
        if self.metrics and not self.metrics_keys and self._fs.isfile(self.metrics_file_path):
            earlier = self.metrics_file_path
            paths = (f"{earlier.removesuffix('.csv')}-v{number}.csv" for number in count(1))
            self.metrics_file_path = next(filterfalse(self._fs.exists, paths))
            tell(f"{earlier} is of an earlier command: this one logs to {self.metrics_file_path}")
        super().save()


def settle_folder(trainer: Namespace) -> None:
    """Let ``default_root_dir`` name the run's folder, if it is set: a logger's folder outside becomes this one."""
    root, folder, logger = trainer.get("default_root_dir"), run_folder(trainer), first_logger(trainer)
    inside = root is None or folder is None or folder.resolve().is_relative_to(Path(root).resolve())
    if logger is not None and not inside:
        logger.init_args.update(Namespace(save_dir=str(root), name=None, version=""))


def first_logger(trainer: Namespace) -> Namespace | None:
    """Return the settings of a trainer's first logger if it is TensorBoard's or a CSV file's; else None."""
    logger = trainer.get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    kind: Any = locate(logger.class_path) if isinstance(logger, Namespace) else None
    return logger if isinstance(kind, type) and issubclass(kind, TensorBoardLogger | CSVLogger) else None


def run_folder(trainer: Namespace) -> Path | None:
    """Return the folder that a trainer's settings give the run; None if the logger gives each run a new one."""
    if trainer.get("logger") is False:
        return Path(trainer.get("default_root_dir") or ".")
    if (logger := first_logger(trainer)) is None or (version := logger.init_args.get("version")) is None:
        return None
    version = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.init_args.save_dir, logger.init_args.get("name") or "", version)


def check_folder(trainer: Namespace) -> None:
    """Raise InputError, before data are made, if the folder that a trainer's settings give the run is not writable.

    The first process of the first machine writes there.
    """
    logger, root = first_logger(trainer), trainer.get("default_root_dir") or "."
    folder = run_folder(trainer) or Path(logger.init_args.save_dir if logger else root)
    first = not getattr(rank_zero_only, "rank", 0) and os.environ.get("NODE_RANK", "0") == "0"
    known = logger is not None or trainer.get("logger") in (None, True, False)  # not of other loggers
    if known and ":/" not in str(folder) and first:
        check_writable(folder / "checkpoints")


def tell_earlier_run(trainer: Trainer) -> None:
    """Say in one line that the checkpoint folders of a new run hold checkpoints of an earlier one."""
    found = [path for folder in checkpoint_places(trainer) for path in sorted(folder.glob("*.ckpt"))]
    if found and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        tell(
            f"{found[0].parent} holds an earlier run ({found[0].name}): this run starts anew and writes beside it; "
            f"--ckpt_path last goes on with that run, another {FOLDER} keeps the two apart"
        )


def last_files(folder: Path) -> list[Path]:
    """List the checkpoints called ``last`` in a folder; without one, all but intact ones of weights alone."""
    return [*folder.glob("last*.ckpt")] or [
        path for path in folder.glob("*.ckpt") if checkpoint_problem(path, False) or not holds_weights_alone(path)
    ]


def checkpoint_places(trainer: Trainer) -> list[Path]:
    """List the folders where a run's callbacks save checkpoints."""
    keepers: list[Any] = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    found = [str(one._ModelCheckpoint__resolve_ckpt_dir(trainer)).removeprefix(f"{Path.cwd()}/") for one in keepers]
    return [*map(Path, found)] or [fallback_folder(trainer)]


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint called ``last`` of this run; without one, the newest that a run can resume from.

    None if there is none. It is looked for where the run's callbacks write it: in no other folder, which may be that of
    another run. If the newest is damaged, :func:`newest_intact` chooses another checkpoint.
    """
    found = [path for folder in checkpoint_places(trainer) for path in last_files(folder)]
    found += [Path(one.ckpt_path) for one in trainer.checkpoint_callbacks if isinstance(one, OnExceptionCheckpoint)]
    return newest_intact(found)


def last_of_earlier_start(trainer: Trainer, settings: Namespace) -> Path | None:
    """Return the newest checkpoint of earlier starts, if the logger gives each start a folder, by a number or an id.

    The folder is ``NAME/version_3/checkpoints``, for example. None if the settings name it, or the folder of
    checkpoints, beside which other runs may lie.
    """
    given, root = settings.get("logger"), settings.get("default_root_dir")
    given = given[0] if isinstance(given, list) and given else given
    named = given.init_args if isinstance(given, Namespace) else Namespace()
    keepers = [one.dirpath for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    if run_folder(settings) is not None or any([*keepers, *map(named.get, ("version", "id", "run_id"))]):
        return None
    starts = [folder for one in checkpoint_places(trainer) for folder in one.parent.parent.glob("*/checkpoints")]
    if path := newest_intact([path for folder in starts for path in last_files(folder)]):
        if root is None or not path.resolve().is_relative_to(Path(root).resolve()):
            raise InputError(
                "ckpt_path: last: the logger gives each start a folder of its own, and this one is new; "
                f"give {path}, or give the run a folder of its own by --{FOLDER}"
            )
        tell(f"ckpt_path: last: going on from {path}, of an earlier start in {root}")
    return path


def without_slashes(keeper: ModelCheckpoint) -> None:
    """Let ``{val/accuracy}`` in a checkpoint's name become ``val_accuracy=0.71``; a slash would make a folder."""
    if keeper.auto_insert_metric_name and re.search(r"\{[^}]*/", keeper.filename or ""):
        named = re.sub(r"\{([^}:]+)", lambda found: f"{found[1].replace('/', '_')}={found[0]}", keeper.filename or "")
        keeper.filename, keeper.auto_insert_metric_name = named, False


def result_lines(trainer: Trainer) -> Iterator[str]:
    """Yield lines that name what a run of ``fit`` has written: checkpoints, LoRA, pictures, log; on every rank."""
    folder = log_folder(trainer)  # a collective call
    yield f"optimiser step {trainer.global_step}, the run's folder is {folder}"
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint):
            kept = {"checkpoint": keeper.last_model_path or ("" if keeper.monitor else keeper.best_model_path)}
            kept |= {f"best {keeper.monitor}": keeper.best_model_path if keeper.monitor else ""}
            # A Path would take a slash out of an address.
            yield from (f"  {word}: {path if '://' in path else Path(path)}" for word, path in kept.items() if path)
    words = {PolicyLoRA: "LoRA", SampleGrid: "samples", ScoredPairGrid: "pairs"}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if type(one) in words and (path := output_path(trainer, one.output_name)).exists():
            yield f"  {words[type(one)]}: {path}"
    for stop in trainer.early_stopping_callbacks:
        if stop.stopping_reason_message:
            yield f"  ended by EarlyStopping: {stop.stopping_reason_message.partition(' Signaling')[0]}"
    if trainer.loggers:
        shows = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        yield f"  log: {folder}" + (f" (tensorboard --logdir {folder})" if shows else "")
