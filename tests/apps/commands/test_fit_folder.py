"""The folder of a run: its name, what ``last`` finds there, and what fit says at its end."""

from pathlib import Path
from uuid import uuid4

import pytest
from lightning.pytorch.loggers import Logger

from latentreward.apps.cli import main
from tests.marks import slow_after
from tests.small_user import SEEN, refusal, run

LAST = ("--trainer.callbacks+=LastCheckpoint", "--trainer.max_steps=2")
SHIPPED = (
    "--config=configs/trainer/cpu.yaml",
    "--model=tests.small_user.SmallUserModule",
    "--data=tests.small_user.SmallUserData",
    "--trainer.callbacks=null",
    "--trainer.callbacks+=LastCheckpoint",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def fit(*settings: str) -> int:
    """Fit with the shipped trainer file; return the number of optimiser steps of this process."""
    main(["fit", *SHIPPED, *settings])
    return len(SEEN)


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a run without a logger has left ``checkpoints/last.ckpt``."""
    monkeypatch.chdir(tmp_path)
    fit("--trainer.max_steps=2", "--trainer.logger=false")
    return tmp_path


@pytest.mark.slow
def test_last_is_that_of_this_run(
    left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "--trainer.logger.name=new"
    assert fit(named, "--trainer.max_steps=1", "--ckpt_path=last") == 1
    main(["validate", *SHIPPED, named, "--ckpt_path=last"])
    with pytest.raises(SystemExit):
        main(["validate", *SHIPPED, "--trainer.logger.name=other", "--ckpt_path=last"])
    assert "ckpt_path: last: " in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    without = "--trainer.enable_checkpointing=false"
    assert fit("--trainer.logger.name=third", "--trainer.callbacks=null", without, "--trainer.max_steps=3") == 3
    assert fit("--trainer.logger=false", "--trainer.max_steps=3") == 1


@pytest.mark.parametrize("logger", ["false", "true", "{class_path: CSVLogger, init_args: {save_dir: file/run}}"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_data_are_made(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    data = ("--data=latentreward.tinyworld.TinyWorldDataModule", "--data.root=drawn")
    place = "--trainer.default_root_dir=file/run"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model=tests.small_user.SmallUserModule", *data, place, f"--trainer.logger={logger}"])
    assert stop.value.code == 2 and not Path("drawn").exists()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("latentreward: error: file/run") and "cannot be written to (Not a directory)" in line


def test_last_is_the_newest_checkpoint_where_none_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    keeper = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, save_top_k: -1%s}}"

    def steps(name: str, limit: int, more: str = "") -> int:
        plain = [keeper % more if "LastCheckpoint" in one else one for one in SHIPPED]
        main(["fit", *plain, f"--trainer.logger.name={name}", f"--trainer.max_steps={limit}", "--ckpt_path=last"])
        return len(SEEN)

    assert [steps("a", 2), steps("a", 3)] == [2, 1]
    newest = max((tmp_path / "runs/a/checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert newest.name == "epoch=0-step=3.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert steps("a", 4) == 2
    assert "step=3.ckpt is damaged" in caplog.text and "going on from the previous one" in caplog.text
    alone = ", save_weights_only: true"  # for scoring, not for resuming
    assert [steps("b", 2, alone), steps("b", 2, alone)] == [2, 2]


class IdLogger(Logger):
    """A logger that names each start by an id, as those of Weights & Biases and MLflow do."""

    def __init__(self, save_dir: str | None = None, version: str | None = None) -> None:
        super().__init__()
        self.version, self._save_dir = version or uuid4().hex, save_dir

    name = "project"
    version = ""
    save_dir = property(lambda self: self._save_dir)

    def log_metrics(self, *args: object, **options: object) -> None: ...

    def log_hyperparams(self, *args: object, **options: object) -> None: ...


LOGGERS = ["true", f"{__name__}.IdLogger", "CSVLogger, init_args: {save_dir: mine}"]
LOGGERS += [f"{__name__}.IdLogger, init_args: {{save_dir: mine/logs}}"]


@pytest.mark.parametrize("logger", slow_after(3, LOGGERS))
def test_last_is_that_of_an_earlier_start_in_the_runs_folder(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loggers that give each start a folder, such as version_0, version_1, …"""
    monkeypatch.chdir(tmp_path)
    given = logger if logger == "true" else f"{{class_path: {logger}}}"
    shipped = ("--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: mine, version: ''}}",)
    plain = (*SHIPPED[1:], "--trainer.accelerator=cpu", *shipped * ("IdLogger" in logger), f"--trainer.logger={given}")
    own = (*plain, "--trainer.default_root_dir=mine")
    with pytest.warns(UserWarning, match="No checkpoint will be loaded"):
        main(["fit", *own, "--ckpt_path=last", "--trainer.max_steps=1"])
    assert len(SEEN) == 1
    assert [*Path().glob("config*.yaml")] == []
    main(["fit", *own, "--ckpt_path=last", "--trainer.max_steps=3"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert len(SEEN) == 2 and "of an earlier start in mine" in capsys.readouterr().err
    main(["fit", *own, "--trainer.max_steps=4"])
    assert len(SEEN) == 1
    Path("mine").rename("lightning_logs" if (root := logger == "true") else "logs")
    if root:  # without a folder of the run's own, the checkpoint may be another run's
        (tmp_path / "lightning_logs/lightning_logs/version_0").rename("lightning_logs/version_0")
        with pytest.raises(SystemExit):
            main(["fit", *plain, "--ckpt_path=last", "--trainer.max_steps=5"])
        assert "give lightning_logs/version_0/checkpoints/last.ckpt, or give the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "folder"),
    slow_after(
        2,
        [
            (("--trainer.default_root_dir=runs/a",), "runs/a"),
            (("--trainer.logger.name=a",), "runs/a"),
            (("--trainer.logger.save_dir=b",), "b/run"),
            (("--trainer.default_root_dir=b", "--trainer.logger.save_dir=b", "--trainer.logger.name=a"), "b/a"),
            (("--trainer.default_root_dir=b", "--trainer.logger.name=a"), "b"),
        ],
    ),
)
def test_one_setting_names_the_folder(
    settings: tuple[str, ...],
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(*settings, "--trainer.max_steps=1")
    assert (tmp_path / folder / "config.yaml").is_file()
    assert (tmp_path / folder / "checkpoints/last.ckpt").is_file()
    told = capsys.readouterr().err
    assert f"  checkpoint: {folder}/checkpoints/last.ckpt\n" in told
    assert f"  log: {folder} (tensorboard --logdir {folder})" in told
    main(["fit", f"--config={folder}/config.yaml", "--trainer.default_root_dir=again"])
    assert (tmp_path / "again/config.yaml").is_file()


def test_what_a_csv_logger_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each later command that logs writes a file of its own; a fit that is refused or has nothing to do writes none."""
    short, last = (*LAST, "--trainer.val_check_interval=1"), "--ckpt_path=last"
    run("fit", tmp_path, *short)
    folder, told = tmp_path / "run", capsys.readouterr().err
    written = {folder / "metrics.csv": (folder / "metrics.csv").read_bytes()}
    assert written[folder / "metrics.csv"].count(b"\n") == 3 and "of an earlier command" not in told
    run("fit", tmp_path, *short, last)
    refusal(capsys, "fit", tmp_path, *short, last, "--model.width=4")
    assert [*folder.glob("metrics*")] == [*written]
    for number, command in enumerate((("validate", last), ("fit", *short, last, "--trainer.max_steps=3")), start=1):
        run(command[0], tmp_path, *command[1:])
        path = folder / f"metrics-v{number}.csv"
        assert f"metrics.csv is of an earlier command: this one logs to {path}\n" in capsys.readouterr().err
        written[path] = path.read_bytes()
        assert {path: path.read_bytes() for path in folder.glob("metrics*")} == written
