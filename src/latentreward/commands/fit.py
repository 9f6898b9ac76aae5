"""The subcommands that run a Lightning trainer: fit, validate, test, predict."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from pydoc import locate
from tempfile import TemporaryDirectory
from typing import Any, Literal

from jsonargparse import ActionYesNo, Namespace
from jsonargparse.typing import PositiveFloat
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from latentreward.backbones.registry import backbone_names
from latentreward.callbacks import ExactResume, GracefulStop, NaNGuard, PairScoreWriter, ResumedSettings
from latentreward.callbacks.graceful_stop import fallback_folder
from latentreward.checkpoints.files import (
    DurableCheckpointIO,
    checkpoint_problem,
    fetched,
    newest_intact,
    without_password,
)
from latentreward.checkpoints.shards import check_weights, damaged, read_sharded
from latentreward.errors import InputError, errors_at
from latentreward.settings.errors import summarise
from latentreward.settings.functions import (
    MODE,
    ConfigFile,
    SettingsParser,
    input_error_behind,
    naming_variables,
    prepare,
)
from latentreward.settings.ranges import check_ranges
from latentreward.settings.rewriting import rewrite_arguments
from latentreward.storage.locks import lock_run

SIGTERM_STATUS = 143
LOADERS = {"fit": "train", "validate": "val"}
"""Subcommand -> what Lightning calls its data, where that is not the same word."""


class Parser(SettingsParser, LightningArgumentParser):
    """Lightning's parser with our errors, in which callbacks add up."""

    @override
    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        return super().dump(without_repeated_callbacks(namespace), *args, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` beside the logs; one that is there already stays, and the new one gets a number."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.log_dir or ".")  # asks all ranks, so it stands outside the condition
        number = 0
        while not self.already_saved and trainer.is_global_zero and (folder / self.config_filename).exists():
            number += 1
            self.config_filename = f"config_{number}.yaml"
        super().setup(trainer, pl_module, stage)
        if number:
            print(f"settings are in {folder / self.config_filename}: config.yaml is an earlier run's", file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put settings that the checkpoint replaced into the file, which was written before it was read."""
        folder = Path(trainer.log_dir or ".")
        (resumed,) = [callback for callback in trainer.callbacks if isinstance(callback, ResumedSettings)]  # type: ignore[attr-defined]
        if resumed.in_force and trainer.is_global_zero:
            for name, value in resumed.in_force.items():
                self.config[name.replace(".", ".init_args.")] = value
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)


class TrainingCLI(LightningCLI):
    """Lightning's command line for one subcommand.

    Args:
        command: Name of the subcommand; parsers of the others are not built.
        arguments: What follows it.
        folder: For a checkpoint that is fetched from an address; each process fetches its own copy, because those of a
            run may be on several machines.
        held: Holds the lock of the run folder.
    """

    def __init__(self, command: str, arguments: Sequence[str], folder: Path, held: ExitStack) -> None:
        self.command, self.folder, self.held, self.estimates = command, folder, held, False
        super().__init__(
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": MODE, "allow_abbrev": False, "prog": "latentreward"},
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
        parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file; may be given several times.")
        return parser

    @override
    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        if self.command == "predict":  # the writer holds the scores, so the trainer need not keep them in memory
            self._subcommand_parsers["predict"].set_defaults(return_predictions=False)

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning's, but data before model: a wrong path is known before any weights are loaded."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # They act in training alone, but config.yaml of a run names them, and its checkpoints are evaluated with that.
        parser.add_lightning_class_args(NaNGuard, "nan_guard")
        parser.add_lightning_class_args(ExactResume, "exact_resume")
        parser.add_lightning_class_args(GracefulStop, "graceful_stop")
        parser.add_argument(
            "--rank_timeout_s",
            type=PositiveFloat,
            default=1800.0,
            help="Seconds that a rank waits for the others, as they load, validate or save, before the run ends.",
        )
        parser.add_argument(
            "--resume_override",
            type=list[Literal["lr", "schedule", "batch_size"]],
            default=[],
            help="What a resumed run takes from the settings, not from the checkpoint: lr, schedule, batch_size.",
        )
        parser.add_lightning_class_args(ResumedSettings, "resumed_settings")
        parser.link_arguments("resume_override", "resumed_settings.override")
        if self.command == "predict":
            parser.add_lightning_class_args(PairScoreWriter, "predictions")
        if self.command == "fit":
            parser.add_argument(
                "--estimate",
                action=ActionYesNo,
                nargs="?",
                default=False,
                help="Compute the memory and computation that the run needs, print them, and end; from configs alone.",
            )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            raise InputError(summarise(str(error))) from error
        if self.command == "fit":
            self.estimates = self.config[self.command].pop("estimate")  # no setting of a run
        check_ranges(self.config[self.command])
        self.config[self.command] = without_repeated_callbacks(self.config[self.command])

    @override
    def _parse_ckpt_path(self) -> None:
        """Settings come from files and the command line, never from a checkpoint."""

    @override
    def instantiate_classes(self) -> None:
        settings = self.config[self.command]
        check_data(self.command, settings)
        if self.estimates:
            return
        given = local = settings.get("ckpt_path")
        if "://" in (given or ""):
            local, given = str(fetched(given, self.folder)), without_password(given)
            settings["ckpt_path"] = given  # which config.yaml holds
        if settings.get("weights_only") is False:
            raise InputError("weights_only: false would let a checkpoint run code; leave it out")
        if local not in (None, "last", "hpc"):  # which are Lightning's to resolve
            check_checkpoint(local, given)
        with constructor_errors():
            super().instantiate_classes()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = DurableCheckpointIO()
        self.config_init[self.command]["ckpt_path"] = local
        guard_loading(self.trainer, self.model)
        # Strategies given by name have no settings; one given by class keeps a timeout of its own.
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = timedelta(seconds=self.config[self.command]["rank_timeout_s"])

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.estimates:
            super()._run_subcommand(subcommand)
            return
        from latentreward.estimate.settings import estimate

        print(estimate(self.config[subcommand], self._build_module))

    def _build_module(self, settings: Namespace) -> LightningModule:
        """The module alone, as ``fit`` makes it."""
        alone = Namespace(subcommand="fit", fit=Namespace(model=settings.model))
        with constructor_errors():
            return self.parser.instantiate(alone)["fit"].model

    def before_fit(self) -> None:
        """Lock the run folder once the ranks are there; a job that SLURM started again goes on unasked."""
        self.trainer.strategy.setup_environment = partial(lock_run, self.trainer, self.held)  # type: ignore[method-assign]
        settings = self.config_init[self.command]
        if settings["ckpt_path"] is None and int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            settings["ckpt_path"] = "last"
        self._find_last()

    def _find_last(self) -> None:
        """Find the checkpoint that ``last`` stands for."""
        settings = self.config_init[self.command]
        if settings["ckpt_path"] == "last" and (path := last_checkpoint(self.trainer)):
            settings["ckpt_path"] = str(path)

    before_validate = before_test = before_predict = _find_last


@contextmanager
def constructor_errors() -> Iterator[None]:
    """Say in one line what constructors have against their settings.

    Raises:
        InputError: In place of their own errors.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, MisconfigurationException) as error:
        raise InputError(input_error_behind(error) or summarise(str(error))) from error
    except (RuntimeError, TypeError) as error:
        if str(error).startswith("`devices`"):
            raise InputError(f"trainer.devices: {summarise(str(error))}") from error
        if "stateful callback" not in str(error):
            raise
        raise InputError(
            "trainer.callbacks: of two alike the states cannot be told apart; for two ModelCheckpoint, let "
            "monitor, mode, every_n_train_steps or every_n_epochs differ"
        ) from error


def check_data(command: str, settings: Namespace) -> None:
    """Refuse settings without data, which Lightning would miss once the model is loaded.

    Raises:
        InputError: If there is no data and the model's class brings none.
    """
    loader = f"{LOADERS.get(command, command)}_dataloader"
    model = getattr(locate(settings["model"]["class_path"]), loader, None)
    if settings.get("data") is None and model is getattr(LightningModule, loader):
        raise InputError(
            "data is missing; give it in a --config file, such as configs/data/tinyworld_pickapic.yaml, or as --data"
        )


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint called ``last`` where this run keeps its own, or what :func:`newest_intact` puts for it."""
    candidates = [fallback_folder(trainer) / "last.ckpt"]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            candidates += map(Path, callback._find_last_checkpoints(trainer))
    return newest_intact(candidates)


def guard_loading(trainer: Trainer, model: LightningModule) -> None:
    """Have whatever checkpoint ``trainer`` loads checked, and compared with the weights of ``model``.

    Lightning chooses files too, for ``hpc`` or in a job that SLURM started again, and not all of its strategies say
    ``weights_only``. Its strategies' ``load_checkpoint`` is where all ways meet.
    """
    strategy = trainer.strategy
    strategy.load_checkpoint = partial(load_checked, strategy.load_checkpoint)  # type: ignore[method-assign]
    if not strategy.restore_checkpoint_after_setup:  # else weights are sharded by then: FSDP2Strategy compares them
        model.register_load_state_dict_pre_hook(partial(compare_weights, trainer))


def load_checked(load: Callable[..., dict[str, Any]], path: str | Path, weights_only: bool | None = None) -> Any:
    """Load a checkpoint by a strategy's method ``load`` as tensors and plain values, whatever ``weights_only``."""
    check_checkpoint(path, path)
    content = load(path, weights_only=True)
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        raise InputError(f"ckpt_path: {path} is no checkpoint of Lightning; give one that `fit` wrote")
    return content


def compare_weights(trainer: Trainer, model: LightningModule, state_dict: Mapping[str, Any], *_: Any) -> None:
    """Hook before ``load_state_dict``, which would name thousands of weights if they are of another model."""
    with errors_at(f"ckpt_path: {trainer.ckpt_path}: "):
        shapes = {name: getattr(value, "shape", ()) for name, value in state_dict.items()}
        check_weights(model, shapes, model.strict_loading)


def check_checkpoint(path: str | Path, given: str | Path) -> None:
    """Look at a checkpoint before anything is loaded for it.

    Args:
        path: File or folder.
        given: What messages call it: the address that it was fetched from, for example.

    Raises:
        InputError: If it holds more than tensors and plain values, which could run code, or is damaged.
    """
    if Path(path).is_dir():
        read_sharded(Path(path), with_tensors=False)
        return
    if not Path(path).is_file():
        raise InputError(f"ckpt_path: {path} does not exist")
    if problem := checkpoint_problem(Path(path)):
        raise InputError(f"ckpt_path: {damaged(given, problem)}")


def without_repeated_callbacks(settings: Namespace) -> Namespace:
    """A copy in which equal callbacks are one: a saved config stacked on the files it came from changes nothing."""
    settings = settings.clone()
    callbacks = settings.get("trainer.callbacks")
    if isinstance(callbacks, list):
        settings["trainer.callbacks"] = [one for index, one in enumerate(callbacks) if one not in callbacks[:index]]
    return settings


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one trainer subcommand.

    Raises:
        InputError: If a setting, or what it leads to in a constructor, is wrong.
        SystemExit: With the status of :class:`GracefulStop`, 143 after SIGTERM (Lightning itself would exit with 0).
    """
    settings = prepare(arguments)
    try:
        with TemporaryDirectory(prefix="latentreward-") as folder, ExitStack() as held:
            rewritten = rewrite_arguments(settings, backbone_names(), root=f"{command}.")
            if any(argument.startswith("--estimate") for argument in settings):
                from latentreward.estimate.sources import unset_variables

                held.enter_context(unset_variables())
            with naming_variables():
                TrainingCLI(command, rewritten, Path(folder), held)
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except SIGTERMException as stop:
        sys.exit(stop.code or SIGTERM_STATUS)
