"""The subcommands that run a Lightning trainer: fit, validate, test, predict."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import chain, count
from pathlib import Path
from pydoc import locate
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionYesNo, Namespace
from jsonargparse.typing import PositiveFloat
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import csv_logs
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

import latentreward.callbacks as ours
import latentreward.core.checkpoints.fsdp2  # noqa: F401 - registers the short names of its strategies
from latentreward.apps.commands import fit_folder
from latentreward.apps.commands.fit_folder import FOLDER
from latentreward.apps.estimate.estimate import Card
from latentreward.callbacks.resumed_settings import Override, log_folder, run_kind
from latentreward.core.checkpoints import files as checkpoint_files
from latentreward.core.checkpoints.shards import check_weights, damaged, newest_first, read_sharded
from latentreward.core.errors import InputError, errors_at, where
from latentreward.core.interrupts import TERMINATED
from latentreward.core.registry import backbone_names
from latentreward.core.settings import functions
from latentreward.core.settings.errors import check_ranges, summarise
from latentreward.core.settings.functions import constructor_errors
from latentreward.core.settings.rewriting import rewrite_arguments
from latentreward.core.storage.durable import lock_run, write_file
from latentreward.data import PairReader
from latentreward.data.datamodules import PairLoaders
from latentreward.data.readers.base import DATA_ON_ERROR, OWN_ON_ERROR
from latentreward.data.splits import USED, tell_unopened

if TYPE_CHECKING:
    from latentreward.apps.estimate.estimate import Estimate

CONFIG, SAVED = "config.yaml", "config*.yaml"
LEFT_OUT = ("#", "ckpt_path:")
"""Starts of lines in which the settings of one run may differ between two files."""


class Parser(functions.SettingsParser, LightningArgumentParser):
    """Lightning's parser with this package's error messages, which opens the splits that the subcommand needs."""

    @override
    def instantiate(self, namespace: Namespace, *args: Any, **options: Any) -> Any:
        command = namespace.get("subcommand")
        if command in USED and namespace[command].get("data") is not None:
            namespace = namespace.clone()
            namespace[command]["data"] = open_readers(command, namespace[command]["data"])
            # Rows are counted here, before the model is loaded.
            options["instantiators"] = [(partial(with_rows, USED[command]), PairLoaders, True)]
        return super().instantiate(namespace, *args, **options)


class SaveConfig(SaveConfigCallback):
    """Callback that writes the run's settings to ``config.yaml`` beside the logs.

    If an earlier run left other settings there, the new file is called ``config_1.yaml``, and so on. If the newest file
    there has the same settings, apart from ``ckpt_path``, nothing is written. Commands that load a checkpoint look for
    its settings in the checkpoint's folder and one folder up; checkpoint folders elsewhere get a copy. ``validate``,
    ``test`` and ``predict`` write their settings only to a folder without any, because those of ``fit`` belong to the
    checkpoints.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._written: list[Path] = []
        self._first_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the settings of ``validate``, ``test`` or ``predict``."""
        folder = log_folder(trainer)  # a collective call, so all ranks must make it
        if trainer.is_global_zero and trainer.state.fn != TrainerFn.FITTING and not any(folder.glob(SAVED)):
            self._write(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings of ``fit``, with the values that a resumed checkpoint replaced."""
        self._first_step = trainer.global_step
        folder = log_folder(trainer)
        if not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ours.ResumedSettings):
                for name, value in callback.in_force.items():
                    self.config[name.replace(".", ".init_args.")] = value
            if isinstance(callback, ours.Performance):
                self.config["performance"].update(Namespace(callback.chosen))
        self._write(folder)
        if self._written and self._written[0].name != CONFIG:
            print(f"settings are in {self._written[0]}: {CONFIG} is an earlier run's", file=sys.stderr)
        for keeper in trainer.checkpoint_callbacks:
            kept = str(getattr(keeper, "dirpath", None) or "")
            near = {Path(kept).resolve(), Path(kept).resolve().parent}
            if kept and "://" not in kept and folder.resolve() not in near:
                self._write(Path(kept))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the settings of a run that failed before its first optimiser step and saved nothing.

        The checkpoint that ``GracefulStop``, a later callback, saves after a reward server failed needs them.
        """
        stops = [one for one in trainer.callbacks if isinstance(one, ours.GracefulStop)]  # type: ignore[attr-defined]
        if trainer.global_step == self._first_step and not any(stop.saves_after(exception) for stop in stops):
            for path in self._written:
                path.unlink(missing_ok=True)

    def _write(self, folder: Path) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        texts = [text, *(path.read_text(encoding="utf-8") for path in newest_first(folder.glob(SAVED))[:1])]
        new, *newest = ([line for line in one.splitlines() if not line.startswith(LEFT_OUT)] for one in texts)
        if new not in newest:
            names = chain([CONFIG], (f"config_{number}.yaml" for number in count(1)))
            self._written.append(next(folder / name for name in names if not (folder / name).exists()))
            write_file(self._written[-1], text)


class TrainingCLI(LightningCLI):
    """Lightning's command line for one subcommand.

    Args:
        command: Name of the subcommand; parsers of other subcommands are not built.
        arguments: Arguments after the subcommand.
        held: Stack that keeps the lock of the run folder, and the threads that compute the checksums of a checkpoint,
            until the command ends.
    """

    def __init__(self, command: str, arguments: Sequence[str], held: ExitStack) -> None:
        self.command, self.held, self.estimates = command, held, False
        self.estimated: Estimate | None = None  # memory and computation of the run, under --estimate
        self.card = Card(gpu=False)  # device that the estimate is compared with
        super().__init__(
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": functions.MODE, "allow_abbrev": False, "prog": "latentreward"},
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=[command, *arguments],
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.command: LightningCLI.subcommands()[self.command]}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        usage = f"latentreward {self.command} [--config FILE ...] [--SETTING=VALUE ...]"
        parser = self.parser_class(usage=usage, epilog="See latentreward --help for examples.", **kwargs)
        parser.add_argument(
            "-c", "--config", action=functions.ConfigFile, help="YAML file; may be given several times."
        )
        return parser

    @override
    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        # The writer of predictions holds the scores, and Lightning's table of metrics has 16 decimals.
        name = "return_predictions" if self.command == "predict" else "verbose"
        if self.command != "fit":
            self._subcommand_parsers[self.command].set_defaults({name: False})

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Lightning's arguments, with data before model, so a wrong path is found before weights are loaded."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The callbacks act only in training, but validate, test and predict must accept the config.yaml of fit.
        parser.add_lightning_class_args(ours.NaNGuard, "nan_guard")
        parser.add_lightning_class_args(ours.ExactResume, "exact_resume")
        parser.add_lightning_class_args(ours.GracefulStop, "graceful_stop")
        parser.add_lightning_class_args(ours.Performance, "performance")
        parser.add_argument(
            "--rank_timeout_s",
            type=PositiveFloat,
            default=1800.0,
            help="Seconds that a rank waits for the others, as they load, validate or save, before the run ends.",
        )
        parser.add_argument(
            "--resume_override",
            type=list[Override],
            default=[],
            help="What a resumed run takes from the settings, not the checkpoint: lr, batch_size, callbacks.",
        )
        parser.add_lightning_class_args(ours.ResumedSettings, "resumed_settings")
        parser.link_arguments("resume_override", "resumed_settings.override")
        if self.command == "predict":
            parser.add_lightning_class_args(ours.PairScoreWriter, "predictions")
        if self.command == "fit":
            parser.add_argument(
                "--estimate",
                action=ActionYesNo,
                nargs="?",
                default=False,
                help="Compute the memory and computation that the run needs, print them, and end; from configs alone.",
            )
            parser.add_class_arguments(Card, skip={"gpu"}, instantiate=False)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with functions.settings_errors():
            self.config = parser.parse_args(args)
        settings = self.config[self.command]
        if self.command == "fit":
            self._take_estimate(settings)
        check_ranges(settings)
        fit_folder.settle_folder(settings["trainer"])
        settings["trainer.callbacks"] = without_repeated(settings["trainer.callbacks"])

    def _take_estimate(self, settings: Namespace) -> None:
        """Take what only an estimate reads out of the settings, so that no run records it."""
        self.estimates = settings.pop("estimate")
        given = {name: settings.pop(name) for name in ("card_gb", "tflops")}
        self.card = Card(settings["trainer"]["accelerator"] != "cpu", **given)

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would read settings from the checkpoint."""

    @override
    def instantiate_classes(self) -> None:
        settings = self.config[self.command]
        loader = f"{USED[self.command][0]}_dataloader"
        own_loader = getattr(locate(settings["model"]["class_path"]), loader, None)
        if settings.get("data") is None and own_loader is getattr(LightningModule, loader):
            raise InputError(  # Lightning would check only after the model was loaded
                "data is missing; give it in a --config file, such as configs/data/tinyworld_pickapic.yaml, or as "
                "--data"
            )
        if self.estimates:
            return
        given = settings.get("ckpt_path")
        if settings.get("weights_only") is False:
            raise InputError("weights_only: false would let a checkpoint run code; leave it out")
        if self.command == "fit" and not settings["trainer"]["fast_dev_run"]:
            fit_folder.check_folder(settings["trainer"])
        if given not in (None, "last", "hpc"):
            check_checkpoint(given, values=False, resumes=self.command == "fit")
        with constructor_errors():
            super().instantiate_classes()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = checkpoint_files.DurableCheckpointIO()
        guard_loading(self.trainer, self.model)
        # A strategy with the default timeout gets rank_timeout_s; one given by class with its own timeout keeps it.
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = timedelta(seconds=settings["rank_timeout_s"])

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with :class:`RunProgress` in place of Lightning's own bar.

        Without a logger, ``LearningRateMonitor`` is left out.
        ``default_root_dir`` becomes the run's folder, where Lightning looks for ``hpc`` and :class:`GracefulStop` saves
        without a ``ModelCheckpoint``: another folder may be another run's.
        """
        settings = self.config_init[self.command]["trainer"]
        if (folder := fit_folder.run_folder(self.config[self.command]["trainer"])) is not None:
            kwargs["default_root_dir"] = str(folder)
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        added: list[theirs.Callback] = []
        off = settings["enable_progress_bar"] is False or settings["barebones"]
        if not off and not any(isinstance(callback, theirs.ProgressBar) for callback in given):
            kwargs["enable_progress_bar"] = False
            added.append(ours.RunProgress())
        csv_logs.ExperimentWriter = fit_folder.MetricsWriter  # type: ignore[misc]  # CSVLogger has no setting for it
        trainer = super().instantiate_trainer(**kwargs)
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, theirs.ModelCheckpoint):
                fit_folder.without_slashes(keeper)
        left_out = () if trainer.loggers else theirs.LearningRateMonitor  # it would raise, and shipped files have one
        kept = [one for one in trainer.callbacks if not isinstance(one, left_out)]  # type: ignore[attr-defined]
        trainer.callbacks = [*kept, *added]  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.estimates:
            super()._run_subcommand(subcommand)
            return
        from latentreward.apps.estimate.estimate import estimate

        def build_module(settings: Namespace) -> LightningModule:
            alone = Namespace(subcommand="fit", fit=Namespace(model=settings.model))  # without trainer and data
            with constructor_errors():
                return self.parser.instantiate(alone)["fit"].model

        self.estimated = estimate(self.config[subcommand], build_module)

    def before_fit(self) -> None:
        """Prepare ``fit``: lock the run folder when all ranks have started, and find the checkpoint to resume from.

        A job that SLURM restarted resumes from ``last`` if ``ckpt_path`` is not set. Lightning's warning about a
        non-empty checkpoint folder is suppressed: ``tell_earlier_run`` has told of it.
        """
        self.trainer.strategy.setup_environment = partial(lock_run, self.trainer, self.held)  # type: ignore[method-assign]
        settings = self.config_init[self.command]
        if settings["ckpt_path"] is None and int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            settings["ckpt_path"] = "last"
        self._find_checkpoint()
        if not settings["ckpt_path"]:
            fit_folder.tell_earlier_run(self.trainer)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

    def after_fit(self) -> None:
        """Say what the run has written, and where."""
        lines = list(fit_folder.result_lines(self.trainer))  # a collective call
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("\n".join(lines), file=sys.stderr)

    def _find_checkpoint(self) -> None:
        """Replace ``ckpt_path: last`` by the path of the run's newest checkpoint, if there is one; check a given one.

        That is done before the trainer starts, whose callbacks may save on an error.
        """
        settings, trainer = self.config_init[self.command], self.trainer
        if (given := settings["ckpt_path"]) == "last":
            found = fit_folder.last_checkpoint(trainer)
            found = found or fit_folder.last_of_earlier_start(trainer, self.config[self.command]["trainer"])
            if found and self.command == "fit":
                check_resumable(found)
            settings["ckpt_path"] = str(found or "last")
        elif given not in (None, "hpc"):
            check_checkpoint(given)

    def before_validate(self) -> None:
        """Find ``ckpt_path: last``; without it Lightning would evaluate the model as it was made, untrained."""
        self._find_checkpoint()
        if self.config_init[self.command]["ckpt_path"] == "last":
            folder = log_folder(self.trainer)
            raise InputError(
                f"ckpt_path: last: the run in {folder} has no checkpoint of that name; choose the run by "
                f"{FOLDER}, or give the checkpoint's path"
            )

    before_test = before_predict = before_validate

    def after_validate(self) -> None:
        """Print the metrics of a validation or test."""
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:<40}{value.item():>10.4f}")

    after_test = after_validate


def open_readers(command: str, data: Namespace) -> Namespace:
    """Replace the settings of a data module's readers by open readers, for the splits that a subcommand needs.

    Other splits are set to None. ``fit`` and ``validate`` also open ``test``, whose prompts are kept out of their own
    splits (see ``shared_prompts``). If ``test`` cannot be opened, they warn and go on, except under
    ``shared_prompts: raise``. Settings of classes other than :class:`PairLoaders` stay unchanged. A subclass that
    overrides the loaders of ``val`` or ``test`` gets all its readers.
    """
    kind, given = locate(data["class_path"]), data.get("init_args") or Namespace()
    if not (isinstance(kind, type) and issubclass(kind, PairLoaders)):
        return data
    shared_prompts, val_share = given.get("shared_prompts", "drop"), given.get("val_share")
    names = [name for name in ("train", "val", "test", "predict") if given.get(name) is not None]
    plain = all(getattr(kind, name) is getattr(PairLoaders, name) for name in ("val_dataloader", "test_dataloader"))
    used = USED[command] if plain else (*names,)
    if names and used[0] in given and given[used[0]] is None and val_share is None:
        raise kind.unset(used[0])
    apart = () if shared_prompts == "keep" or "val" not in used else ("test",)
    if val_share is not None and "val" in used:  # which is a part of train
        used = (*used, "train")
    on_error = given.get("on_error", "raise")
    parser = functions.SettingsParser(parser_mode=functions.MODE)
    parser.add_argument("--reader", type=PairReader)
    for name in names:
        reader = given[name]
        if name not in (*used, *apart):
            given[name] = None
        elif isinstance(reader, Namespace) and "class_path" in reader:
            # For a split of which only the prompts are needed, bad rows are no reason to stop.
            lenient = name not in used and on_error == "raise"
            with_on_error(reader, "placeholder" if lenient else on_error)
            try:
                given[name] = parser.instantiate(Namespace(reader=reader)).reader
            except (ValueError, ImportError, OSError) as error:
                problem = functions.reworded(error).replace(OWN_ON_ERROR, DATA_ON_ERROR)
                if name in used or shared_prompts == "raise":
                    raise InputError(f"data.{name}: {problem}") from error
                tell_unopened(InputError(problem))
                given[name] = None
    return data


def with_rows(names: Sequence[str], kind: type[PairLoaders], *args: Any, **options: Any) -> PairLoaders:
    """Construct a data module, and raise InputError if one of the named splits has no rows left."""
    data = kind(*args, **options)
    data.require_rows(names)
    return data


def with_on_error(reader: Namespace, on_error: str) -> None:
    """Set ``on_error`` in a reader's settings if it is null; of a reader that wraps others, in the inner readers."""
    given = reader.get("init_args") or Namespace()
    inner = [value for value in vars(given).values() if isinstance(value, Namespace) and "class_path" in value]
    for one in inner:
        with_on_error(one, on_error)
    if not inner and "on_error" in given and given["on_error"] is None:
        given["on_error"] = on_error


def guard_loading(trainer: Trainer, model: LightningModule) -> None:
    """Make ``trainer`` check every checkpoint that it loads, and compare its weights with those of ``model``.

    Lightning chooses some checkpoints itself (``hpc``, a job that SLURM restarted), and some of its strategies do not
    set ``weights_only``. All of them load through the strategy's ``load_checkpoint``, which is wrapped here.
    """
    strategy = trainer.strategy
    strategy.load_checkpoint = partial(load_checked, trainer, strategy.load_checkpoint)  # type: ignore[method-assign]
    if not strategy.restore_checkpoint_after_setup:  # otherwise FSDP2Strategy compares them, already sharded
        model.register_load_state_dict_pre_hook(compare_weights)


def load_checked(
    trainer: Trainer, load: Callable[..., dict[str, Any]], path: str | Path, weights_only: bool | None = None
) -> Any:
    """Load a checkpoint by a strategy's method ``load``, always with ``weights_only=True``; to resume, of this kind."""
    check_checkpoint(path)
    content = load(path, weights_only=True)
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        raise InputError(f"ckpt_path: {path} is not a Lightning checkpoint; give one that `fit` wrote")
    kind = run_kind(trainer)
    if trainer.state.fn == TrainerFn.FITTING and content.get("kind", kind) != kind:
        raise InputError(f"ckpt_path: {path} is of {content['kind']}, and this run is {kind}; give one of this run")
    return content


def compare_weights(model: LightningModule, state_dict: Mapping[str, Any], *_: Any) -> None:
    """Compare a checkpoint's weights with the model's before ``load_state_dict``; PyTorch's error would list them all.

    The hook does not hold the trainer, because callbacks may copy the model.
    """
    with errors_at(f"ckpt_path: {getattr(model._trainer, 'ckpt_path', None)}: "):
        shapes = {name: getattr(value, "shape", ()) for name, value in state_dict.items()}
        check_weights(model, shapes, model.strict_loading)


def check_checkpoint(path: str | Path, values: bool = True, resumes: bool = False) -> None:
    """Refuse a checkpoint that is missing, damaged, or could run code, before anything is loaded from it.

    Args:
        path: File, or folder of shards.
        values: Whether to compare the values with their checksums too, which reads all of them.
        resumes: Whether the checkpoint needs the optimiser's state.
    """
    if Path(path).is_dir():
        read_sharded(Path(path), with_tensors=False)  # its InputError names what is missing
    elif not Path(path).is_file():
        raise InputError(f"ckpt_path: {path} does not exist")
    if problem := checkpoint_files.checkpoint_problem(Path(path), values):
        raise InputError(f"ckpt_path: {damaged(path, problem)}")
    if resumes:
        check_resumable(path)


def check_resumable(path: str | Path) -> None:
    """Raise InputError if the checkpoint file at ``path`` holds weights alone."""
    if checkpoint_files.holds_weights_alone(Path(path)):
        raise InputError(
            f"ckpt_path: {path} holds weights alone, without the state of the optimiser (save_weights_only); resume "
            "from a checkpoint that has the optimiser's state, such as the last.ckpt of LastCheckpoint"
        )


def without_repeated(callbacks: Any) -> Any:
    """Return the settings of callbacks in which those of equal class and settings occur once.

    Callbacks repeat if a saved ``config.yaml`` is given together with the files that it was made from. Of several
    ``LastCheckpoint``, for example of a recipe and of a file of configs/trainer after it, the last one is kept.
    """
    if not isinstance(callbacks, list):
        return callbacks
    callbacks = [one for index, one in enumerate(callbacks) if one not in callbacks[:index]]
    keepers = [one for one in callbacks if one.class_path.endswith(f".{ours.LastCheckpoint.__name__}")]
    return [one for one in callbacks if one not in keepers[:-1]]


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one trainer subcommand.

    Raises:
        InputError: If a setting is wrong, or a constructor raises an error because of a setting.
        SystemExit: With the status of :class:`GracefulStop`, 143 after SIGTERM (Lightning itself would exit with 0).
    """
    done = _run(command, arguments)
    if done.estimated is not None:
        from latentreward.apps.estimate.estimate import compare

        print(done.estimated.as_text(), flush=True)
        print(compare(done.estimated, done.card, lambda more: estimate_fit([*arguments, *more])))


def estimate_fit(arguments: Sequence[str]) -> "Estimate":
    """Compute the memory and computation of ``latentreward fit`` with these arguments; no checkpoint is read."""
    kept = [argument for argument in arguments if not argument.startswith(("--ckpt_path", "--estimate"))]
    found = _run("fit", [*kept, "--estimate"]).estimated
    assert found is not None
    return found


def _run(command: str, arguments: Sequence[str]) -> TrainingCLI:
    functions.prepare_parsing(arguments, classes=True)
    try:
        with ExitStack() as held:
            rewritten = rewrite_arguments(arguments, backbone_names(), root=f"{command}.")
            if any(re.fullmatch(r"--estimate(=true|=yes)?", one.lower()) for one in arguments):
                from latentreward.apps.estimate.unread import unset_variables

                held.enter_context(unset_variables())
            return TrainingCLI(command, rewritten, held)
    except MisconfigurationException as error:
        raise InputError(f"{error}{where(error)}") from error
    except (ValueError, RuntimeError, TypeError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith(("lightning.", "torch.optim.")):
            raise
        raise InputError(summarise(str(error)) + where(error)) from error  # such as a val_check_interval above an epoch
    except SIGTERMException as stop:
        sys.exit(stop.code or TERMINATED)
