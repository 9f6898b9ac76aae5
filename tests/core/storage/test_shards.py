"""Shards of work in a folder: claimed once, done once, taken over, and told about."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.contracts import EditPrompt, ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.core.shared_work import ERROR, PLAN, ShardFolder, left_over, read_list
from latentreward.core.storage.durable import claimed

COME_OFTEN = """
import sys
from pathlib import Path
from latentreward.core.shared_work import ShardFolder
for _ in range(200):  # so that processes which start one after another meet
    shared = ShardFolder(Path(sys.argv[1]), int(sys.argv[2]))
    assert not shared.lacks_first()
    shared.leave()
"""


@pytest.fixture
def first(tmp_path: Path) -> ShardFolder:
    return ShardFolder(tmp_path / "run", 0)


def nothing() -> None:
    """No other process has failed."""


def test_two_processes_share_the_shards_and_both_see_all_results(first: ShardFolder) -> None:
    plan = first.plan("draw", [["a"], ["b"], ["c"], ["d"]])
    second = ShardFolder(first.folder, 1).next(nothing)
    assert second is not None and (second.task, second.shards) == ("draw", plan.shards)
    one, other, order = plan.take(0, nothing), second.take(2, nothing), []
    for claims, todo in ((one, plan), (other, second)) * 2:
        number = next(claims)
        order.append(number)
        todo.finish(number, number * 0.1)
    assert order == [0, 2, 1, 3]
    assert list(one) == list(other) == []
    assert plan.results() == second.results() == [(["a"], 0.0), (["b"], 0.1), (["c"], 0.2), (["d"], 0.1 * 3)]


@pytest.mark.parametrize("value", [{"wanted": {"edit": {"kept": 1}}}, {"edit": "a", "sources": ["b"]}])
def test_a_scorer_may_be_named_as_an_edit(first: ShardFolder, value: Any) -> None:
    assert read_list(first.plan("score", [value]).folder).shards == [value]


def test_prompts_keep_the_pictures_that_they_edit(first: ShardFolder, tmp_path: Path) -> None:
    path = ImageRef("a.png", path=tmp_path / "a.png", root=tmp_path)
    prompts = [EditPrompt("make it red", [path]), EditPrompt("make it red", [ImageRef("b", b"\xff\x00")]), "a cat"]
    todo = first.plan("task", [[0, 1, prompts[0]], {"pictures": [["x", prompts[1]], ["y", prompts[2]]]}])
    read = read_list(todo.folder).shards
    (_, _, one), two, three = read[0], *(picture[1] for picture in read[1]["pictures"])
    assert [one, two, three] == prompts and type(three) is str
    assert [*map(sources_of, (one, two, three))] == [*map(sources_of, prompts)]


def test_a_plan_holds_the_bytes_of_a_picture_once(first: ShardFolder) -> None:
    content = b"picture" * 9000
    prompts = [EditPrompt(text, [ImageRef("a", bytes([*content]))]) for text in ("make it red", "make it blue") * 8]
    todo = first.plan("task", [[prompt] for prompt in prompts])
    assert (todo.folder / PLAN).stat().st_size < 2 * len(content)
    assert read_list(todo.folder).shards == [[prompt] for prompt in prompts]


def test_a_shard_that_another_holds_is_waited_for_and_taken_if_it_is_freed(first: ShardFolder) -> None:
    plan, looks = first.plan("draw", [0, 1]), []
    held = claimed(plan.folder / "000000.lock")
    assert held.__enter__()

    def freed_at_the_third_look() -> None:
        looks.append(1)
        if len(looks) == 3:
            held.__exit__(None, None, None)

    claims = plan.take(0, freed_at_the_third_look)
    assert next(claims) == 1
    plan.finish(1, None)
    assert next(claims) == 0
    assert len(looks) >= 3


def test_a_result_is_not_made_twice(first: ShardFolder) -> None:
    plan = first.plan("draw", [0, 1, 2])
    plan.finish(1, "there")
    done = [plan.finish(number, "now") or number for number in plan.take(0, nothing)]
    assert done == [0, 2]


def test_what_a_killed_run_left_is_found(first: ShardFolder, tmp_path: Path) -> None:
    for task, result in (("draw", 1), ("score", 2), ("draw", 3)):
        first.plan(task, ["x", "y"]).finish(1, result)
    assert left_over(tmp_path, "draw") == [("y", 1), ("y", 3)]
    assert left_over(tmp_path, "other") == []
    (tmp_path / "run" / "0" / "000001.json").write_text("{")
    with pytest.raises(InputError, match=r"000001\.json: damaged .*; delete it, and its shard is done again"):
        left_over(tmp_path, "draw")


@pytest.mark.parametrize("content", ["[1]", "1", "[" * 100_000, "{}", '{"task": "draw", "shards": 1}'])
def test_a_foreign_plan_is_one_line(first: ShardFolder, tmp_path: Path, content: str) -> None:
    first.plan("draw", ["x", "y"]).finish(1, 1)
    (tmp_path / "run" / "0" / "0_notes.json").write_text("{}")  # no result
    assert left_over(tmp_path, "draw") == [("y", 1)]
    plan = tmp_path / "other" / "0" / PLAN
    plan.parent.mkdir(parents=True)
    plan.write_text(content)
    with pytest.raises(InputError, match=r"other/0/plan\.json.* damaged \(.*\); delete it, and its shard is") as error:
        left_over(tmp_path, "draw")
    assert "\n" not in str(error.value)
    plan.unlink()
    assert left_over(tmp_path, "draw") == [("y", 1)]


def test_the_end_and_the_death_of_the_first_process_are_seen(first: ShardFolder) -> None:
    second = ShardFolder(first.folder, 1)
    assert not second.lacks_first()
    first.leave()  # as at a kill
    assert second.lacks_first()
    first.end()
    assert second.ended() and not second.lacks_first()
    assert second.next(nothing) is None


def test_locks_that_do_not_reach_a_machine_tell_it_nothing_of_the_first_process(first: ShardFolder) -> None:
    """The second process can take the lock that the first one holds, as on NFS with locks for each machine alone."""
    first.leave()
    second = ShardFolder(first.folder, 1)
    assert not second.lacks_first()
    plan, todo = first.plan("draw", [0]), second.next(nothing)
    assert todo is not None
    todo.finish(0, "drawn")
    assert plan.results() == [(0, "drawn")]


@pytest.mark.slow
def test_neighbours_on_a_machine_that_locks_do_not_reach_are_not_taken_for_the_first_process(
    first: ShardFolder,
) -> None:
    first.leave()
    commands = [[sys.executable, "-c", COME_OFTEN, str(first.folder), str(rank)] for rank in range(1, 5)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in processes] == [0] * 4


def test_the_first_error_is_the_one_that_is_told(first: ShardFolder) -> None:
    assert first.error() is None
    first.note_error("the disk is full", printed=False)
    first.note_error("another", printed=True)
    assert first.error() == ("the disk is full", False)
    assert json.loads((first.folder / ERROR).read_text())["message"] == "the disk is full"
