"""cache, score, generate and evaluate-policy on two processes, one of them killed or failing: the files of one."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.errors import InputError
from latentreward.core.shared_work import ShardList
from tests.alignment.modules.test_edits import KLEIN, edits
from tests.alignment.rewards.stored import write_run
from tests.apps.commands.test_score import write_pictures
from tests.diffusion.cache.writing import write_data
from tests.processes import Forked, rank_environments, run_command, start

pytestmark = pytest.mark.slow
TWO = ("--trainer.accelerator=cpu", "--trainer.devices=2")
SAMPLING = ("--sampling.num_inference_steps=2", "--guidance_scale=1", "--batch_size=2")
SCORER = {"function": "tests.apps.evaluation.policy.toy_scorers.redness", "name": "red"}
RED = json.dumps({"class_path": "latentreward.reward.CallableScorer", "init_args": SCORER})
COMMANDS = {
    "cache": (
        "cache", "out", "--reader=latentreward.data.HPDv3Reader", "--reader.root=data", "--reader.split=train",
        "--encoder=PipelineEncoders", "--encoder.source=sd_tiny", "--encoder.batch_size=2", "--encoder.text=true",
        "--images.size=32", "--images_per_shard=4", "--num_workers=0",
    ),
    "score": ("score", "pics", "out/scores.csv", "--flush_every=2", "--batch_size=2"),
    "generate": ("generate", "prompts.txt", "out", "--policy.source=sd_tiny", *SAMPLING, "--table=jsonl"),
    "evaluate-policy": (
        "evaluate-policy", "out", "--policy.pipeline=sd_tiny", "--prompts=prompts.txt", f"--scorers=[{RED}]", *SAMPLING,
    ),
}  # fmt: skip
"""Command lines in the folder that :func:`inputs` writes; a kill of a cache's rank 1 is in the tests of the cache."""
PATIENCE = 900.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_pictures(folder / "pics", 9)
    (folder / "prompts.txt").write_text("".join(f"a picture of {number} squares\n" for number in range(7)))
    write_run(folder / "model", "lrm", "sd15")
    write_data(folder / "data", pairs=6)
    return folder


@pytest.fixture
def arguments(inputs: Path, request: pytest.FixtureRequest) -> tuple[str, ...]:
    given = COMMANDS[request.param]
    return (*given, f"--model={inputs / 'model'}") if request.param == "score" else given


@pytest.fixture
def whole(arguments: tuple[str, ...], inputs: Path, tmp_path: Path) -> dict[str, str]:
    """Files of one process."""
    return finished(start(alone(arguments), cwd=place(tmp_path / "whole", inputs)), tmp_path / "whole")


def alone(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command line of one process."""
    one = (TWO[0], "--trainer.devices=1") if arguments[0] == "cache" else ("--device=cpu",)
    return (*arguments, *one)


def place(folder: Path, inputs: Path) -> Path:
    """A working folder with the inputs."""
    folder.mkdir(exist_ok=True)
    for name in ("pics", "prompts.txt", "data"):
        if not (folder / name).exists():
            (folder / name).symlink_to(inputs / name)
    return folder


def finished(process: Forked, folder: Path) -> dict[str, str]:
    """Hash of every file that a process has left below ``out``, once it has ended."""
    assert process.wait(PATIENCE) == 0, process.stderr
    files = [path for path in sorted((folder / "out").rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def at_first_result(what: Callable[[], None], arguments: Sequence[str]) -> None:
    """``latentreward`` that does ``what`` when its first shard is done, and its result not yet written."""
    finish = ShardList.finish

    def instead(todo: ShardList, number: int, result: Any) -> None:
        what()
        finish(todo, number, result)

    ShardList.finish = instead  # type: ignore[method-assign]
    run_command(arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise InputError("the disk is on fire; put it out")


def two_ranks(arguments: Sequence[str], cwd: Path, rank: int, what: Callable[[], None]) -> list[Forked]:
    """Two ranks, of which one does ``what`` at its first result."""
    places = rank_environments(2)
    runs: list[Any] = [[run_command, [(*arguments, *TWO)]], [run_command, [(*arguments, *TWO)]]]
    runs[rank] = [at_first_result, [what, (*arguments, *TWO)]]
    return [Forked(*run, cwd=cwd, environment=one) for run, one in zip(runs, places, strict=True)]


@pytest.mark.parametrize("arguments", [name for name in COMMANDS if name != "cache"], indirect=True)
def test_the_part_of_a_killed_rank_is_done_by_the_other(
    arguments: tuple[str, ...], whole: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    first, second = two_ranks(arguments, place(tmp_path / "two", inputs), 1, die)
    assert finished(first, tmp_path / "two") == whole
    assert second.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("arguments", COMMANDS, indirect=True)
def test_after_a_kill_of_the_first_rank_the_next_start_goes_on(
    arguments: tuple[str, ...], whole: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    folder = place(tmp_path / "two", inputs)
    first, second = two_ranks(arguments, folder, 0, die)
    assert first.wait(PATIENCE) == -signal.SIGKILL
    assert second.wait(PATIENCE) == 2
    [line] = [line for line in second.stderr.splitlines() if "latentreward: error" in line]
    assert "the first process has ended before this one" in line
    assert finished(start(alone(arguments), cwd=folder), folder) == whole


@pytest.mark.parametrize("arguments", ["generate"], indirect=True)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_rank_stops_both_with_one_line(
    arguments: tuple[str, ...], inputs: Path, tmp_path: Path, rank: int
) -> None:
    ranks = two_ranks(arguments, place(tmp_path / "two", inputs), rank, fail)
    assert [one.wait(PATIENCE) for one in ranks] == [2, 2]
    lines = [line for one in ranks for line in one.stderr.splitlines() if "error" in line.lower()]
    assert lines == ["latentreward: error: the disk is on fire; put it out"]


@pytest.mark.parametrize("arguments", ["generate"], indirect=True)
@pytest.mark.parametrize(
    ("change", "elsewhere", "message"),
    [
        ("--seed=1", "two", "seed: not as in the first process; give all processes the same command"),
        ("--seed=0", "other", "not all processes can use it; put the output on a file system that all machines share"),
    ],
)
def test_ranks_with_another_command_or_folder_end_with_one_line(
    arguments: tuple[str, ...], inputs: Path, tmp_path: Path, change: str, elsewhere: str, message: str
) -> None:
    """A folder of another place stands for the disk of another machine."""
    environments = rank_environments(2)
    first = start((*arguments, *TWO), cwd=place(tmp_path / "two", inputs), environment=environments[0])
    second = start((*arguments, *TWO, change), cwd=place(tmp_path / elsewhere, inputs), environment=environments[1])
    assert [one.wait(PATIENCE) for one in (first, second)] == [2, 2]
    [line] = [line for one in (first, second) for line in one.stderr.splitlines() if "error" in line.lower()]
    assert message in line


def test_a_wrong_ending_of_the_output_is_one_line(inputs: Path, tmp_path: Path) -> None:
    arguments = ["score", "pics", "out/scores.txt", f"--model={inputs / 'model'}", *TWO]
    folder = place(tmp_path / "two", inputs)
    ranks = [start(arguments, cwd=folder, environment=one) for one in rank_environments(2)]
    assert [one.wait(PATIENCE) for one in ranks] == [2, 2]
    [line] = [line for one in ranks for line in one.stderr.splitlines() if "error" in line.lower()]
    assert line == "latentreward: error: output is out/scores.txt; it must end in .parquet, .csv or .jsonl"


@pytest.mark.parametrize("arguments", ["score"], indirect=True)
def test_ranks_that_lightning_starts(
    arguments: tuple[str, ...], whole: dict[str, str], inputs: Path, tmp_path: Path
) -> None:
    process = start((*arguments, *TWO), cwd=place(tmp_path / "two", inputs))
    assert finished(process, tmp_path / "two") == whole
    assert "Traceback" not in process.stderr


def test_edits_are_made_and_judged_by_two_ranks_as_by_one(tmp_path: Path) -> None:
    """One text for two pictures; the results of ``generate`` are judged against new ones."""
    files = []
    for ranks in (1, 2):
        (folder := tmp_path / f"{ranks}").mkdir()
        rows = [{"prompt": str(edit), "source_images": [edit.sources[0].image_key]} for edit in edits(folder)]
        (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = (*SAMPLING[:-1], "--sampling.height=32", "--sampling.width=48", "--batch_size=1")
        made = ("generate", "edits.jsonl", "out/made", f"--policy.source={KLEIN.folder}", *options)
        judged = ("evaluate-policy", "out/judged", "--policy.images=out/made", f"--scorers=[{RED}]", *options,
                  f"--against.pipeline.source={KLEIN.folder}", "--seed=1")  # fmt: skip
        for arguments in (made, judged):
            if ranks == 1:
                found = finished(start(alone(arguments), cwd=folder), folder)
                continue
            first, second = [
                Forked(run_command, [(*arguments, *TWO)], cwd=folder, environment=one) for one in rank_environments(2)
            ]
            found = finished(first, folder)
            assert second.wait(PATIENCE) == 0, second.stderr
        files.append(found)
    assert files[0] == files[1]
    assert sum(name.startswith("out/judged/pictures/against/sources/") for name in files[0]) == 3
