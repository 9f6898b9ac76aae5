"""The command line itself, with a user's own classes in the current folder as stand-ins for ours."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml

import latentreward
from latentreward.apps.cli import COMMANDS, main
from latentreward.core.errors import NO_GPU, InputError
from latentreward.core.storage.durable import locked
from latentreward.reward.scoring.files import settings_beside
from tests.limits import largest_file
from tests.marks import rotated_after
from tests.processes import finish

SOURCE = Path(latentreward.__file__).parents[1]
PLUGIN = """
    import atexit, errno, os, resource, signal, time
    from collections.abc import Callable
    from types import SimpleNamespace

    import torch
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.strategies import DDPStrategy
    from torch import nn
    from torchmetrics import MeanMetric

    from latentreward.core.registry import register_backbone
    from latentreward.core.errors import InputError
    from latentreward.reward import RemoteServer
    from latentreward.reward.remote.client import Connection


    class Backbone(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width


    def narrow(width: int = 3) -> Backbone:
        if width > 12:
            raise InputError(f"width: {width} is above 12; take fewer")
        return Backbone(width)


    @register_backbone
    def stand_in(width: int = 5) -> Backbone:
        return Backbone(width)


    class Head(nn.Module):
        def __init__(self, spec: int) -> None:
            super().__init__()
            self.project = nn.Linear(spec, 1)


    class DeepHead(Head):
        def __init__(self, spec: int, depth: int = 2) -> None:
            super().__init__(spec)
            self.depth = depth


    class Module(LightningModule):
        def __init__(
            self,
            backbone: Backbone,
            head: Callable[[int], Head],
            lr: float = 0.1,
            root: str = "",
            metric: MeanMetric | None = None,
        ) -> None:
            super().__init__()
            self.width, self.head, self.lr, self.metric = backbone.width, head(1), lr, metric

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.head.project(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("val/score", self.head.project(batch).mean())

        def predict_step(self, batch: torch.Tensor, index: int) -> SimpleNamespace:
            names, scores = [f"{index}"] * len(batch), self.head.project(batch).squeeze(1)
            pairs = SimpleNamespace(pair_ids=names, chosen_keys=names, rejected_keys=names, label=scores)
            pairs.timesteps = pairs.chosen_sigmas = pairs.chosen = pairs.rejected = scores
            return pairs

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)


    class Note(Callback):
        def __init__(self, text: str = "") -> None:
            if not text:
                raise InputError("text: '' is empty; write something")
            self.text = text

        def on_fit_start(self, trainer, module) -> None:
            with open("notes.txt", "a") as notes:
                print(self.text, module.width, module.root if hasattr(module, "root") else "", file=notes)


    class Data(LightningDataModule):
        def __init__(self, root: str = "here", fault: str = "", note: Note | None = None) -> None:
            super().__init__()
            self.root, self.fault = root, fault

        def setup(self, stage: str) -> None:
            faults = {"input": InputError("data.root: no shards; run cache"), "file": FileNotFoundError("no train/")}
            faults |= {"bug": ValueError("shapes differ")}
            if self.fault:
                raise faults[self.fault]

        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(torch.randn(8, 1), batch_size=2)

        val_dataloader = predict_dataloader = train_dataloader


    class Send(Callback):
        def __init__(self, name: str, times: int = 1) -> None:
            self.name, self.times = name, times

        def on_train_batch_start(self, *args) -> None:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.Signals[self.name])


    class LoseServer(Callback):
        def __init__(self, hook: str) -> None:
            setattr(self, hook, self.ask)

        def ask(self, *args) -> None:
            connection = Connection(RemoteServer("http://127.0.0.1:9", retry_s=0.0))
            connection.result(connection.start(connection.asked, "/score", b""))


    class Freeze(Callback):
        def __init__(self, signal: str = "SIGSTOP") -> None:
            self.signal = signal

        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 1:
                print(f"frozen: {os.getpid()}", flush=True)
                os.kill(os.getpid(), signal.Signals[self.signal])

        def on_train_start(self, trainer, *args) -> None:
            if trainer.global_rank == 0:  # an end longer than the 5 s after which Lightning looks for dead ranks
                atexit.register(time.sleep, 6.0)


    class Together(DDPStrategy):
        def setup_environment(self) -> None:
            second = self.cluster_environment.local_rank()
            here = f"rank_1_of_{os.getppid() if second else os.getpid()}"
            if second:
                open(here, "w").close()
            while not os.path.exists(here):  # its imports take longer than a short limit allows
                time.sleep(0.1)
            super().setup_environment()


    class Large(Module):
        def __init__(self, backbone: Backbone, head: Callable[[int], Head]) -> None:
            super().__init__(backbone, head)
            self.register_buffer("zeros", torch.zeros(100_000))
"""
RAISING = next(number for number, line in enumerate(PLUGIN.splitlines(), 1) if "raise faults[" in line)
"""Line of the plugin that raises an error."""
MODEL = """
    model:
      class_path: plugin.Module
      init_args:
        backbone: {class_path: plugin.narrow, init_args: {width: 4}}
        head: {class_path: plugin.DeepHead}
        metric: {class_path: torchmetrics.MeanMetric}
        root: ${data.init_args.root}
    data: {class_path: plugin.Data}
    trainer:
      accelerator: cpu
      logger: false
      enable_checkpointing: false
      enable_progress_bar: false
      enable_model_summary: false
      callbacks:
        - {class_path: plugin.Note, init_args: {text: model file}}
"""
TRAINER = """
    trainer:
      max_steps: 2
      default_root_dir: run
      callbacks:
        - {class_path: plugin.Note, init_args: {text: trainer file}}
"""
NOTE = "model.backbone: Import path plugin.Note does not correspond to a subclass of Backbone"
FIT = ["fit", "--config=model.yaml", "--config", "trainer.yaml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name, text in (("plugin.py", PLUGIN), ("model.yaml", MODEL), ("trainer.yaml", TRAINER)):
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stderr of the first test
    monkeypatch.delenv("LATENTREWARD_DEBUG", raising=False)


def settings(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "fit") -> dict:
    """What ``--print_config`` prints."""
    with pytest.raises(SystemExit) as stop:
        main([command, *FIT[1:], *arguments, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def notes(config: dict) -> list[str]:
    return [callback["init_args"]["text"] for callback in config["trainer"]["callbacks"]]


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line on stderr; before it only Lightning's notes on seed and devices, and that of an earlier run."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    *notes, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    notes = [
        note.removeprefix("INFO: ").removeprefix("note: ")
        for note in notes
        if note and "holds an earlier run" not in note
    ]
    assert all(note.startswith(("Seed", "GPU", "TPU", "trainer.logger: the run's folder")) for note in notes), notes
    assert line.startswith("latentreward: error: ")
    return line.removeprefix("latentreward: error: ")


# ---- answers without Lightning


def test_help_and_version_import_nothing_slow(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, latentreward.apps.cli as c\nc.main(['--help']); c.main(['--version'])\n"
    code += "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("fit", "validate", "test", "predict"))
    assert result.stdout.count("\n  latentreward ") == 3
    assert result.stdout.endswith(f"latentreward {latentreward.__version__}\n")


@pytest.mark.parametrize("command", rotated_after(1, [name for name in COMMANDS if name != "configs"]))
def test_help_has_no_marks_of_sphinx(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert told
    assert not re.findall(r":\w+:`|``", told)


def test_characters_that_stdout_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main(["configs"])
    sizes = next(line for line in written.getvalue().decode("ascii").splitlines() if "lpo_sd21.yaml" in line)
    assert "(512 \\xd7 512)" in sizes
    print("→")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\u2192\n")


def test_a_reader_that_ends_early_is_no_error() -> None:
    """As in ``latentreward configs | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        program = [sys.executable, "-m", "latentreward", "--version"]
        done = subprocess.run(program, check=False, stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


# ---- settings


def test_callbacks_of_stacked_files_and_options_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    note = {"class_path": "plugin.Note", "init_args": {"text": "json"}}
    options = ["--trainer.callbacks", "plugin.Note", "--trainer.callbacks.text=option"]
    config = settings(capsys, *options, f"--trainer.callbacks={json.dumps(note)}", "--seed_everything=7")
    assert notes(config) == ["model file", "trainer file", "option", "json"]
    assert config["seed_everything"] == 7


@pytest.mark.parametrize("cleared", ["null", "[]"])
def test_callbacks_are_cleared_only_in_so_many_words(cleared: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(capsys, "--trainer.callbacks", cleared, "--trainer.callbacks=Note", "--trainer.callbacks.text=x")
    assert notes(config) == ["x"]


def test_interpolation_typed_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--data.root=there",
        "--model.root=${data.init_args.root}/x",
        "--trainer.default_root_dir=${data.init_args.root}",
    ]
    config = settings(capsys, *options)
    assert config["model"]["init_args"]["root"] == "there/x"
    assert config["trainer"]["default_root_dir"] == "there"


@pytest.mark.parametrize(
    "options",
    [
        ["--model.backbone=stand_in"],
        ["--model.init_args.backbone", "stand_in"],
        ["--config", "model: {init_args: {backbone: {class_path: stand_in}}}"],
        ["--config=shorter.yaml"],
    ],
)
def test_backbone_by_short_name(options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings(capsys)  # imports plugin, which registers the name
    (folder / "shorter.yaml").write_text("model: {init_args: {backbone: stand_in}}\n")
    backbone = settings(capsys, *options)["model"]["init_args"]["backbone"]
    assert backbone["class_path"] == "plugin.stand_in"


@pytest.mark.parametrize("name", rotated_after(2, ["cpu", "one_gpu", "eight_gpus", "fsdp2", "slurm"]))
def test_packaged_trainers_are_found_from_any_folder_and_keep_last_ckpt(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(capsys, f"--config=configs/trainer/{name}.yaml")
    assert config["trainer"]["gradient_clip_val"] == 1.0
    callbacks = [callback["class_path"].rsplit(".")[-1] for callback in config["trainer"]["callbacks"]]
    assert callbacks[:2] == ["Note", "Note"]  # of the files before
    assert "LastCheckpoint" in callbacks[2:]
    assert "TrainableCheckpoint" in callbacks


# ---- runs


@pytest.mark.slow
def test_saved_config_reproduces_the_run(folder: Path) -> None:
    main(
        [*FIT, "--trainer.callbacks=plugin.Note", "--trainer.callbacks.text=option", "--trainer.default_root_dir=first"]
    )
    saved = yaml.safe_load((folder / "first" / "config.yaml").read_text())
    assert notes(saved) == ["model file", "trainer file", "option"]
    assert saved["model"]["init_args"]["root"] == "here"
    assert saved["seed_everything"] == 0
    main(["fit", "--config=first/config.yaml", "--trainer.default_root_dir=again"])
    again = yaml.safe_load((folder / "again" / "config.yaml").read_text())
    assert again["trainer"].pop("default_root_dir") == "again"
    assert again == {**saved, "trainer": {key: saved["trainer"][key] for key in again["trainer"]}}
    lines = (folder / "notes.txt").read_text().splitlines()
    assert lines[:3] == lines[3:6]
    main([*FIT, "--config=first/config.yaml", "--trainer.default_root_dir=both"])
    assert notes(yaml.safe_load((folder / "both" / "config.yaml").read_text())) == notes(saved)  # equal ones are one


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = [*FIT[1:], "--model=plugin.Large", "--trainer.default_root_dir=full", "--trainer.enable_checkpointing=true"]
    large += [
        "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {save_last: true, every_n_train_steps: 1}}"
    ]
    with largest_file(100_000), pytest.raises(SystemExit, match="2"):
        main(["fit", *large])
    assert "no checkpoint was written before it: free some space and start the run" in capsys.readouterr().err
    main(["fit", *large])
    checkpoints = {path: path.read_bytes() for path in (folder / "full").rglob("*.ckpt")}
    assert len(checkpoints) == 2
    with largest_file(100_000), pytest.raises(SystemExit, match="2"):
        main(["fit", *large, "--trainer.max_steps=4", "--ckpt_path=last"])
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert re.match(
        r"latentreward: error: no space left for full/checkpoints/\S+\.ckpt \(File too large\); the check", line
    )
    assert line.endswith("written before are kept: free some space and go on with --ckpt_path last")
    assert {path: path.read_bytes() for path in checkpoints} == checkpoints
    assert not list((folder / "full").rglob("*.partial"))


@pytest.mark.slow
def test_one_fit_in_a_folder_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(folder / "taken", "output_dir"):
        before = sorted((folder / "taken").iterdir())
        line = error_line(capsys, *FIT, "--trainer.default_root_dir=taken")
        logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=taken", "--trainer.logger.name="]
        logged = error_line(capsys, *FIT, *logger, "--trainer.logger.version=", "--trainer.default_root_dir=null")
        assert sorted((folder / "taken").iterdir()) == before
        main([*FIT, "--trainer.default_root_dir=free"])
    assert line.startswith("trainer.default_root_dir: taken is being written by another run (process ")
    assert logged.startswith("trainer.logger.save_dir: taken is being written by another run (process ")
    main([*FIT, "--trainer.default_root_dir=taken"])
    assert (folder / "taken" / "config.yaml").is_file()


@pytest.mark.slow
def test_settings_are_written_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a folder that has them as its newest file they are not written again, nor those of an evaluation."""

    def run(command: str, *options: str) -> list[str]:
        keeper = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+={class_path: ModelCheckpoint}"]
        main([command, *FIT[1:], *keeper, "--trainer.default_root_dir=once", *options])
        return sorted(path.name for path in (folder / "once").glob("config*.yaml"))

    assert run("fit") == ["config.yaml"]
    first = (folder / "once" / "config.yaml").read_bytes()
    (checkpoint,) = (folder / "once").rglob("*.ckpt")
    assert run("fit", f"--ckpt_path={checkpoint}") == run("fit") == run("validate", "--model.lr=0.5") == ["config.yaml"]
    assert (folder / "once" / "config.yaml").read_bytes() == first
    assert "settings are in" not in capsys.readouterr().err
    assert run("fit", "--model.lr=0.5") == ["config.yaml", "config_1.yaml"]
    assert "settings are in once/config_1.yaml: config.yaml is an earlier run's\n" in capsys.readouterr().err
    assert run("fit") == ["config.yaml", "config_1.yaml", "config_2.yaml"]  # the newest file is that of a checkpoint


@pytest.mark.parametrize("command", rotated_after(1, ["validate", "predict"]))
def test_other_subcommands_take_the_saved_config_of_fit(command: str, folder: Path) -> None:
    main([*FIT, "--trainer.default_root_dir=second"])
    main([command, "--config=second/config.yaml", f"--trainer.default_root_dir={command}"])
    assert (folder / command / "predictions" / "scores_rank0.parquet").is_file() == (command == "predict")


# ---- what a run prints and leaves

SHOWN = ["--trainer.enable_progress_bar=null"]


@pytest.mark.slow
def test_a_resumed_fit_prints_what_tells_a_user_something(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Device, settings, checkpoint, progress and why it ended: all that it prints, logs and warns of."""
    options = [*FIT, *SHOWN, "--trainer.log_every_n_steps=1", "--trainer.default_root_dir=plain"]
    options += ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    options += ["--trainer.callbacks.save_last=true", "--trainer.max_steps"]
    main([*options, "4"])
    for record in (capsys.readouterr, caplog.clear, recwarn.clear):
        record()
    main([*options, "6", "--ckpt_path=last"])
    assert [one for one in caplog.messages if not one.startswith("HTTP")] == [
        "GPU available: False, used: False",
        "Restoring states from the checkpoint path at plain/checkpoints/last.ckpt",
        "`Trainer.fit` stopped: `max_steps=6` reached.",
    ]
    printed = capsys.readouterr()
    without_rates = re.sub(r" +[\d.?]+ steps/s", "  …", printed.err)  # a small rate is padded by a space
    assert re.sub(r"\S+ left", "…", without_rates).splitlines() == [
        "settings are in plain/config_1.yaml: config.yaml is an earlier run's",
        "train 4/6 steps  …  …",
        "train 6/6 steps  …, epoch=2  …",
        "optimiser step 6, the run's folder is plain",
        "  checkpoint: plain/checkpoints/last.ckpt",
    ]
    assert printed.out == ""
    assert [str(one.message) for one in recwarn if "jsonargparse" not in str(one.message).lower()] == []


def test_settings_lie_beside_checkpoints_that_are_elsewhere(folder: Path) -> None:
    keeper = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=kept/here", "--model.lr=0.5"]
    main([*FIT, *keeper, "--trainer.enable_checkpointing=true", "--trainer.default_root_dir=logs"])
    (checkpoint,) = (folder / "kept" / "here").glob("*.ckpt")
    assert settings_beside(checkpoint).parent == checkpoint.parent
    assert settings_beside(checkpoint).read_bytes() == (folder / "logs" / "config.yaml").read_bytes()


@pytest.mark.parametrize(("hook", "kept"), [("on_train_start", False), ("on_train_batch_start", True)])
def test_settings_stay_beside_the_checkpoint_of_a_run_whose_reward_server_failed(
    hook: str, kept: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it failed in the first rollout; before training there is nothing to save."""
    lost = ["--trainer.callbacks+=plugin.LoseServer", f"--trainer.callbacks.hook={hook}"]
    line = error_line(capsys, *FIT, *lost, f"--trainer.default_root_dir={hook}")
    assert ("saved optimiser step 0; go on with --ckpt_path" in line) == kept
    assert [path.name for path in (folder / hook).glob("config*.yaml")] == ["config.yaml"] * kept
    assert len([*(folder / hook).rglob("last.ckpt")]) == kept


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_stops_fit_with_its_status(name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--trainer.callbacks=plugin.Send", f"--trainer.callbacks.name={name}", "--trainer.max_steps=50"])
    assert stop.value.code == 128 + signal.Signals[name]
    assert list(Path().rglob("last.ckpt"))


@pytest.mark.slow
def test_a_second_ctrl_c_is_one_line() -> None:
    options = ["--trainer.callbacks.name=SIGINT", "--trainer.callbacks.times=2", "--trainer.max_steps=50"]
    result = finish([*FIT, "--trainer.callbacks=plugin.Send", *options])
    assert result.returncode == 130, result.stderr
    assert "latentreward: stopped by Ctrl-C\n" in result.stderr
    assert not any(word in result.stderr for word in ("Traceback", "Tip", "graceful"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
def test_a_rank_that_does_not_answer_ends_the_run_after_its_time_limit(sent: str) -> None:
    two = ["--trainer.devices=2", '--trainer.strategy={"class_path": "plugin.Together"}', "--rank_timeout_s=20"]
    freeze = ["--trainer.callbacks=plugin.Freeze", f"--trainer.callbacks.signal={sent}"]
    result = finish([*FIT, *two, "--trainer.max_steps=50", *freeze])
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("latentreward: error: ")]
    assert "another rank is gone, or has not answered rank 0 for 0:00:20 (--rank_timeout_s)" in line
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    (frozen,) = re.findall(r"frozen: (\d+)", result.stdout)
    state, end = Path(f"/proc/{frozen}/stat"), time.monotonic() + 600
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the frozen rank lives on"
        time.sleep(0.1)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--model.head.depht=3", "model.head: Option 'depht' is not accepted; did you mean 'depth'?"),
        ("--model.head.depth=x", "model.head.depth: expected int, got 'x'"),
        ("--model.head=plugin.DepHead", "model.head: module 'plugin' has no attribute 'DepHead'"),
        ("--model.loss=x", "model: Option 'loss' is not accepted; choose from backbone, head, lr, metric, root"),
        ("--model.backbone=plugin.Note", NOTE),
        ("--model.backbone.width=99", "width: 99 is above 12; take fewer"),
        ("--data.note=plugin.Note", "text: '' is empty; write something"),
        ("--trainer.accelerator=gpu --trainer.devices=9", None if torch.cuda.is_available() else NO_GPU),
        ("--config=unknown_key.yaml", "Subcommand 'fit' does not accept option 'modle.lr'; did you mean 'model'?"),
        ("--config=extra.yaml", "extra.yaml: model: Option 'lrr' is not accepted; did you mean 'lr'?"),
        ("--config=broken.yaml", None),
        ("--config=text.yaml", "text.yaml: Unexpected config: just text"),
        ("--data.fault=input", "data.root: no shards; run cache"),
        ("--data.fault=bug", f"shapes differ (ValueError, plugin.py:{RAISING}; --debug shows the traceback)"),
        ("--data.fault=file", f"no train/ (FileNotFoundError, plugin.py:{RAISING}; --debug shows the traceback)"),
    ],
)
def test_bad_input_of_ones_own_classes_is_one_line(
    options: str, line: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "unknown_key.yaml").write_text("modle: {lr: 1}\n")
    (folder / "extra.yaml").write_text("model: {init_args: {lrr: 1}}\n")
    (folder / "broken.yaml").write_text("model: {lr: 1\n  x: 2\n")
    (folder / "text.yaml").write_text("just text\n")
    got = error_line(capsys, *FIT, *options.split())
    assert line is None or got == line


def test_bugs_and_debug_keep_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        main([*FIT, "--data.fault=bug", "--debug"])
    with pytest.raises(InputError):
        main([*FIT, "--data.fault=input", "--debug"])
    monkeypatch.setattr("latentreward.apps.commands.configs.shipped_configs", None)
    with pytest.raises(TypeError):
        main(["configs"])
