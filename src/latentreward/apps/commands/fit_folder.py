"""The folder of a run: which setting names it, what an earlier run left there, and what a run has written."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from latentreward.apps.commands.notes import tell
from latentreward.backbones.stored_adapters import CONFIG
from latentreward.callbacks import PolicyLoRA
from latentreward.callbacks.graceful_stop import fallback_folder
from latentreward.checkpoints.files import checkpoint_problem, holds_weights_alone, newest_intact
from latentreward.checkpoints.shards import newest_first
from latentreward.storage.durable import check_writable

FOLDER = "trainer.default_root_dir"
"""Setting that names the folder of a run."""


def settle_folder(trainer: Namespace, arguments: Sequence[str]) -> None:
    """Let ``--trainer.default_root_dir`` name the run's folder, whatever folder the logger's settings give.

    A logger's folder inside ``default_root_dir`` stays. So does every other folder of a logger, if only files set
    ``default_root_dir``; a line then names the folder.
    """
    root, folder, logger = trainer.get("default_root_dir"), run_folder(trainer), first_logger(trainer)
    if folder is None or logger is None:
        return
    by_logger = any(re.match(r"--trainer\.logger\.(init_args\.)?(name|save_dir)\b", one) for one in arguments)
    if root is None or folder.resolve().is_relative_to(Path(root).resolve()):
        if by_logger:
            tell(f"trainer.logger: the run's folder is {folder}; --{FOLDER} {folder} names it for every kind of run")
    elif any(one.startswith(f"--{FOLDER}") for one in arguments):
        logger.init_args.update(Namespace(save_dir=str(root), name=None, version=""))
        if by_logger:
            tell(f"{FOLDER}: the run's folder is {root}, not {folder} of trainer.logger")
    else:
        tell(f"trainer.logger: the run's folder is {folder}; to have {FOLDER}={root}, say so on the command line")


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


def tell_earlier_run(trainer: Namespace) -> None:
    """Say in one line that the checkpoint folders of a new run hold checkpoints of an earlier one."""
    for folder in checkpoint_folders(trainer):
        if found := sorted(path.name for path in folder.glob("*.ckpt")):
            tell(
                f"{folder} holds an earlier run ({found[0]}): this run starts anew and writes beside it; "
                f"--ckpt_path last goes on with that run, another {FOLDER} keeps the two apart"
            )
            return


def checkpoint_folders(trainer: Namespace) -> list[Path]:
    """List the folders where a trainer's settings let the run save checkpoints, as far as they name them."""
    callbacks = trainer.get("callbacks") or []
    given = [one.get("init_args", {}).get("dirpath") for one in callbacks if isinstance(one, Namespace)]
    folders = [Path(folder) for folder in given if folder and "://" not in str(folder)]
    if (folder := run_folder(trainer)) is not None:
        folders.append(folder / "checkpoints")
    return folders


def likely_checkpoint(word: str, trainer: Namespace) -> Path | None:
    """Return the checkpoint that a word probably means; :func:`last_checkpoint` knows it, once callbacks are made.

    Args:
        word: ``last`` or ``hpc``.
        trainer: Settings of the trainer.
    """
    if word == "last":
        found = [path for folder in checkpoint_folders(trainer) for path in last_files(folder)]
    else:
        found = [*(run_folder(trainer) or Path()).glob("hpc_ckpt_*.ckpt")]
    return next(iter(newest_first(found)), None)


def last_files(folder: Path) -> list[Path]:
    """List the checkpoints called ``last`` in a folder; without one, all its checkpoints."""
    return [*folder.glob("last*.ckpt")] or [*folder.glob("*.ckpt")]


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint called ``last`` of this run; without one, the newest that a run can resume from.

    None if there is none. It is looked for where the run's callbacks write it: in no other folder, which may be that of
    another run. If the newest is damaged, :func:`newest_intact` chooses another checkpoint.
    """
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    candidates, others = [] if keepers else [fallback_folder(trainer) / "last.ckpt"], list[Path]()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found = callback._find_last_checkpoints(trainer)  # absolute paths
            candidates += [Path(path.removeprefix(f"{Path.cwd()}/")) for path in found]
            folder: Any = callback._ModelCheckpoint__resolve_ckpt_dir(trainer)  # type: ignore[attr-defined]
            others += Path(str(folder).removeprefix(f"{Path.cwd()}/")).glob("*.ckpt")
        elif isinstance(callback, OnExceptionCheckpoint):
            candidates.append(Path(callback.ckpt_path))
    if not any(path.exists() for path in candidates):
        candidates = [path for path in others if checkpoint_problem(path, False) or not holds_weights_alone(path)]
    return newest_intact(candidates)


def last_of_earlier_version(trainer: Trainer) -> Path | None:
    """Return the newest of :func:`last_files` in folders ``version_N`` beside the run's own; None if there is none."""
    folder = Path(trainer.log_dir or ".")  # a collective call
    if not re.fullmatch(r"version_\d+", folder.name):
        return None
    found = [path for one in folder.parent.glob("version_*/checkpoints") for path in last_files(one)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def without_slashes(keeper: ModelCheckpoint) -> None:
    """Let ``{val/accuracy}`` in a checkpoint's name become ``val_accuracy=0.71``; a slash would make a folder."""
    if keeper.auto_insert_metric_name and re.search(r"\{[^}]*/", keeper.filename or ""):
        named = re.sub(r"\{([^}:]+)", lambda found: f"{found[1].replace('/', '_')}={found[0]}", keeper.filename or "")
        keeper.filename, keeper.auto_insert_metric_name = named, False


def loaded_by(folder: Path, trainer: Trainer) -> str:
    """Return the call that loads the LoRA in a folder, which PolicyLoRA wrote in diffusers' format or in peft's."""
    if not (folder / CONFIG).is_file():
        return " (pipeline.load_lora_weights(folder) of diffusers)"
    policy: Any = trainer.lightning_module.policy
    return f" (PeftModel.from_pretrained(pipeline.{policy.family.part}, folder) of peft)"


def result_lines(trainer: Trainer) -> Iterator[str]:
    """Yield lines that name what a run of ``fit`` has written: checkpoints, LoRA, pictures, log; on every rank."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective call
    yield f"optimiser step {trainer.global_step}, the run's folder is {folder}"
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint):
            kept = {"checkpoint": keeper.last_model_path or ("" if keeper.monitor else keeper.best_model_path)}
            kept |= {f"best {keeper.monitor}": keeper.best_model_path if keeper.monitor else ""}
            # A Path would take a slash out of an address.
            yield from (f"  {word}: {path if '://' in path else Path(path)}" for word, path in kept.items() if path)
    lora = next((one.folder for one in trainer.callbacks if isinstance(one, PolicyLoRA)), None)  # type: ignore[attr-defined]
    written = {"LoRA": lora or folder / "lora", "samples": folder / "samples", "pairs": folder / "scored_pairs.png"}
    for word, path in written.items():
        if path.exists():
            yield f"  {word}: {path}" + (loaded_by(path, trainer) if word == "LoRA" else "")
    for stop in trainer.early_stopping_callbacks:
        if stop.stopping_reason_message:
            yield f"  ended by EarlyStopping: {stop.stopping_reason_message.partition(' Signaling')[0]}"
    if trainer.loggers:
        shows = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        yield f"  log: {folder}" + (f" (tensorboard --logdir {folder})" if shows else "")
