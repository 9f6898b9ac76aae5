"""A resumed run says what the checkpoint overrides, and takes from its settings what it is told to."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from latentreward.apps.cli import main
from tests.marks import slow_after
from tests.small_user import ROWS, SEEN, SmallUserData, SmallUserModule, refusal, run

COSINE = ("--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.eta_min=0.001")


def start(folder: Path, *settings: str, steps: int = 4) -> tuple[Path, list[list[int]]]:
    """Checkpoint and batches of the first ``steps`` steps of a run that was stopped after one more."""
    saving = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    each_step = ("--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1")
    run("fit", folder, f"--trainer.max_steps={steps + 1}", *settings, saving, *each_step)
    return folder / "run" / "checkpoints" / f"epoch=0-step={steps}.ckpt", SEEN[:steps]


def resume(folder: Path, checkpoint: Path, *settings: str, steps: int = 10) -> SmallUserModule:
    return run("fit", folder, f"--trainer.max_steps={steps}", f"--ckpt_path={checkpoint}", *settings)


def rate(module: SmallUserModule) -> float:
    return module.trainer.optimizers[0].param_groups[0]["lr"]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.removeprefix("resume: ") for line in caplog.messages if line.startswith("resume: ")]


def saved(folder: Path, number: int = 1) -> dict:
    return yaml.safe_load((folder / "run" / f"config_{number}.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", slow_after(1, [[], [*COSINE, "--model.lr_scheduler.T_max=20"]]), ids=["constant", "cosine"]
)
def test_a_plain_resume_says_nothing_and_is_the_rest_of_the_run(
    schedule: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.1", *schedule)
    whole = run("fit", tmp_path / "whole", "--trainer.max_steps=10", *settings)
    resumed = resume(tmp_path, start(tmp_path, *settings)[0], *settings)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rate(whole) == rate(resumed)
    assert lines(caplog) == []


@pytest.mark.slow
def test_the_checkpoints_settings_win_and_the_saved_config_states_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.1", "--model.optimizer.betas=[0.8,0.99]", *COSINE)
    checkpoint, _ = start(tmp_path, *first, "--model.lr_scheduler.T_max=20")
    whole = run("fit", tmp_path / "whole", "--trainer.max_steps=10", *first, "--model.lr_scheduler.T_max=20")
    given = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.01", "--model.optimizer.weight_decay=0.5", *COSINE)
    resumed = resume(tmp_path, checkpoint, *given, "--model.lr_scheduler.T_max=50", "--data.batch_size=4")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert lines(caplog) == [
        "data.batch_size stays 2 as in the checkpoint, not 4 as given; --resume_override=[batch_size] takes it",
        "model.optimizer.betas stays [0.8, 0.99] as in the checkpoint, not [0.9, 0.999] as given",
        "model.optimizer.lr stays 0.1 as in the checkpoint, not 0.01 as given; --resume_override=[lr] takes it",
        "model.optimizer.weight_decay stays 0.01 as in the checkpoint, not 0.5 as given",
        "model.lr_scheduler.T_max stays 20 as in the checkpoint, not 50 as given; --resume_override=[lr] takes it",
    ]
    config = saved(tmp_path)
    optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
    assert optimizer["lr"] == 0.1
    assert optimizer["betas"] == [0.8, 0.99]
    assert optimizer["weight_decay"] == 0.01
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["T_max"] == 20
    assert config["data"]["init_args"]["batch_size"] == 2
    caplog.clear()
    main(["fit", f"--config={tmp_path}/run/config_1.yaml", f"--ckpt_path={checkpoint}"])
    assert lines(caplog) == []


ADAM = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.1")
CYCLE = ("--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.total_steps=100")
LINEAR = ("--model.lr_scheduler=LinearLR", "--model.lr_scheduler.total_iters=100")
COSINE_20 = (*COSINE, "--model.lr_scheduler.T_max=20")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "given"),
    [
        ((), ()),
        (COSINE_20, COSINE_20),
        (COSINE_20, LINEAR),
        (COSINE_20, ()),
        ((), LINEAR),
        ((*CYCLE, "--model.lr_scheduler.max_lr=0.2"), (*CYCLE, "--model.lr_scheduler.max_lr=0.4")),
    ],
    ids=["constant", "cosine", "another", "none after", "none before", "a cycle"],
)
def test_a_given_rate_and_schedule_go_on_as_if_they_had_always_been(
    before: tuple[str, ...], given: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, _ = start(tmp_path, *ADAM, *before)
    settings = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.01", *given)
    resumed = resume(tmp_path, checkpoint, *settings, "--resume_override=[lr]")
    whole = run("fit", tmp_path / "whole", "--trainer.max_steps=10", *settings)
    assert rate(resumed) == pytest.approx(rate(whole), rel=1e-12)
    if not (before or given):
        assert [line.partition(",")[0] for line in lines(caplog)] == ["model.optimizer.lr is 0.01 from here on"]
        config = saved(tmp_path)
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


@pytest.mark.slow
def test_another_class_of_optimiser_or_schedule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = start(tmp_path, *ADAM, *COSINE_20, steps=1)
    for given, key in (
        ((*ADAM, *LINEAR), "model.lr_scheduler"),
        (("--model.optimizer=SGD",), "model.optimizer is SGD"),
    ):
        assert key in refusal(capsys, "fit", tmp_path, *given, f"--ckpt_path={checkpoint}")


def test_another_batch_size_sees_each_pair_of_the_epoch_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, before = start(tmp_path, "--data.batch_size=2", steps=5)
    resume(tmp_path, checkpoint, "--data.batch_size=4", "--resume_override=[batch_size]", steps=9)
    assert [len(batch) for batch in SEEN] == [4, 4, 4, 2]
    assert sorted(row for batch in before + SEEN for row in batch) == list(range(ROWS))
    assert lines(caplog)[0].startswith("data.batch_size is 4 from here on, 2 in the checkpoint")
    assert saved(tmp_path)["data"]["init_args"]["batch_size"] == 4


@pytest.mark.parametrize(
    "schedule",
    slow_after(
        2,
        [
            ["--model.lr_scheduler=CosineAnnealingWarmRestarts", "--model.lr_scheduler.T_0=7"],
            [
                "--model.lr_scheduler=OneCycleLR",
                "--model.lr_scheduler.max_lr=0.2",
                "--model.lr_scheduler.total_steps=20",
            ],
            ["--model.lr_scheduler=MultiStepLR", "--model.lr_scheduler.milestones=[2,6]"],
        ],
    ),
)
def test_progress_of_a_schedule_is_no_setting(
    schedule: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("--model.optimizer=AdamW", "--model.optimizer.lr=0.1", *schedule)
    resume(tmp_path, start(tmp_path, *settings)[0], *settings)
    assert lines(caplog) == []


LAST = "--trainer.callbacks+=LastCheckpoint"
FINDERS = [
    "LearningRateFinder, init_args: {num_training_steps: 3, min_lr: 1.0e-3, max_lr: 0.1, early_stop_threshold: null}",
    "BatchSizeFinder, init_args: {max_trials: 1, steps_per_trial: 1, init_val: 2}",
]


@pytest.mark.parametrize("finder", slow_after(1, FINDERS))
def test_a_search_is_no_part_of_a_resumed_run(finder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searching = f"--trainer.callbacks+={{class_path: lightning.pytorch.callbacks.{finder}}}"
    settings = ("--model=tests.small_user.SteppedUserModule", LAST)
    run("fit", tmp_path, *settings, searching, "--trainer.max_steps=4")
    said = refusal(capsys, "fit", tmp_path, *settings, searching, "--ckpt_path=last")
    assert said.startswith(f"trainer.callbacks: {finder.partition(',')[0]} has searched")
    run("fit", tmp_path, *settings, "--ckpt_path=last", "--trainer.max_steps=6")
    assert len(SEEN) == 2


class Counting(Callback):
    """A user's own with a state."""

    def state_dict(self) -> dict[str, int]:
        return {"count": 3}


OWNERS = ["TrainableEMA", "EarlyStopping", f"{__name__}.Counting"]


@pytest.mark.parametrize("owner", slow_after(2, OWNERS))
def test_a_state_without_its_callback_is_refused_or_dropped_as_told(
    owner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = "{monitor: val/loss, strict: false}" if owner == "EarlyStopping" else "{}"
    watching = f"--trainer.callbacks+={{class_path: {owner}, init_args: {monitor}}}"
    run("fit", tmp_path, watching, LAST, "--trainer.max_steps=4")
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    said = refusal(capsys, "fit", tmp_path, LAST, "--ckpt_path=last")
    assert f"the state of {owner.rpartition('.')[2]}" in said and "--resume_override=[callbacks]" in said
    assert not SEEN and (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before
    run("fit", tmp_path, LAST, "--ckpt_path=last", "--resume_override=[callbacks]", "--trainer.max_steps=5")
    assert len(SEEN) == 1 and "is dropped" in lines(caplog)[0]


def test_a_time_limit_and_other_times_of_saving_are_no_reason_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {monitor: val/loss}}"
    run("fit", tmp_path, best, LAST, "--trainer.max_time=00:01:00:00", "--trainer.max_steps=4")
    run("fit", tmp_path, LAST, "--ckpt_path=last", "--trainer.max_steps=5")
    assert len(SEEN) == 1 and ["ModelCheckpoint" in line for line in lines(caplog)] == [True]


class OtherModule(SmallUserModule):
    """Another method with the same weights."""


class OtherData(SmallUserData):
    """Another way to the same data, such as a cache."""


def test_a_checkpoint_of_another_module_is_refused_and_one_of_other_data_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", tmp_path, LAST, "--trainer.max_steps=2")
    said = refusal(capsys, "fit", tmp_path, LAST, f"--model={__name__}.OtherModule", "--ckpt_path=last")
    assert "is of SmallUserModule" in said and "OtherModule" in said
    run("fit", tmp_path, LAST, f"--data={__name__}.OtherData", "--ckpt_path=last", "--trainer.max_steps=3")
    assert len(SEEN) == 1


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_nobody_logs_is_one_line(
    callback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watching = f"--trainer.callbacks+={{class_path: {callback}, init_args: {{monitor: val/los}}}}"
    assert "val/loss" in refusal(capsys, "fit", tmp_path, "--trainer.max_epochs=2", watching)
