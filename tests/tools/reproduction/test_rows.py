"""The shipped rows: what they name exists, every arm's command parses, every step runs."""

import re
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.core.errors import InputError
from tests.marks import rotated_after
from tools.reproduce import main as program
from tools.reproduction.rows import WHOLE, all_rows, read_row

ROOT = Path(__file__).resolve().parents[3]
ROWS = all_rows()
TOY = {
    "title": "Toy",
    "paper": "LRM",
    "claim": "Ours: one beats the other.",
    "run": "Two arms.",
    "cpu_seconds": 1,
    "arms": {"one": {}, "other": {"lrm": "--model.head.guidance=3.0"}},
    "metrics": {"t 1": {"of": "lrm_drawn", "kind": "accuracy", "timestep": 1}},
    "claims": [{"says": "one beats the other", "higher": "one", "lower": "other", "by": "t 1"}],
}


def test_rows_name_shipped_configs() -> None:
    named = [name for row in ROWS.values() for name in row.miniature_of]
    assert {"configs/recipes/lrm_sd15.yaml", "configs/recipes/dina_lrm_sd35.yaml"} <= set(named)
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", rotated_after(1, [name for name in ROWS if not name.startswith(("tiny", "tuning"))], release=3)
)
def test_commands_of_all_arms_parse(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fits = [task for task in ROWS[name].tasks(WHOLE, quick=True).values() if task.arguments[0] == "fit"]
    for task in fits:
        with pytest.raises(SystemExit) as ended:
            main([*task.command(tmp_path), "--print_config"])
        assert not ended.value.code, capsys.readouterr().err
    assert fits


def test_equal_steps_are_shared() -> None:
    row = read_row("toy", TOY)
    one, other = (row.task(arm, "lrm_drawn", 0) for arm in row.arms)
    assert one.key != other.key
    assert one.inputs["lrm"].inputs["pickapic"].key == other.inputs["lrm"].inputs["pickapic"].key
    assert row.task("one", "lrm", 1).key != one.inputs["lrm"].key
    assert row.task("one", "pickapic", 1).key == row.task("one", "pickapic", 0).key


def test_a_whole_repetition_draws_its_data_and_keeps_what_is_held_out() -> None:
    row = read_row("toy", TOY)
    keys = {seed: row.task("one", "pickapic", seed).key for seed in (0, WHOLE - 1, WHOLE, WHOLE + 1)}
    assert keys[0] == keys[WHOLE - 1]
    assert len({*keys.values()}) == 3
    assert row.task("one", "generated", WHOLE).key == row.task("one", "generated", 0).key
    for name, other in ROWS.items():
        for task in other.tasks(WHOLE).values():
            text = " ".join(task.arguments)
            assert task.module not in ("tools.emoji.pairs", "tools.edited_pairs") or text.endswith("--seed {seed}")
            if other.world:  # steps of their own write pairs
                continue
            seeded = re.findall(r"--data\.(?:\w+\.)*(?:data_seed|seed)=\{seed\}", text)
            assert seeded or task.arguments[0] != "fit" or "edited" in task.inputs, (name, task.name)
            for place, pairs in re.findall(r"--(data\S*)\.root=\{(\w+)\}/pairs", text):
                if task.inputs.get(pairs, task).arguments[0] == "validate":  # which writes the training pairs
                    assert f"--{place}.data_seed={{seed}} --{place}.val_seed=0" in text, (name, task.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": "LRN"}, "toy: paper: "),
        ({"seeds": 2}, "toy: seeds=2"),
        ({"rewards": ["lrn"]}, "toy: rewards: there is no 'lrn'"),
        ({"seedz": 3}, "toy: seedz: "),
        ({"arms": {"one": {"lrn": ""}}}, "toy: arms.one: there is no 'lrn'"),
        ({"arms": {"one": {"lrm": "--data.root={pickpic}/pairs"}}}, "{pickpic} names no step"),
        ({"metrics": {"m": {"of": "lrm_drwn", "kind": "accuracy"}}}, "'lrm_drwn'"),
        ({"metrics": {"m": {"of": "lrm_drawn", "kind": "acuracy"}}}, "m.kind: "),
        ({"claims": [{"says": "", "higher": "two", "lower": "one", "by": "t 1"}]}, "claims[0]: there is no 'two'"),
        ({"claims": [{"says": "", "higher": "one", "lower": "one", "by": "t 2"}]}, "'t 2'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_row("toy", {**TOY, **change})


def test_the_program_shows_rows_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    program(["lrm_pretraining", "--status"])
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["lrm_pretraining", "3", "of", "3"]
    with pytest.raises(SystemExit) as stop:
        program(["lrm_pretrainin", "--status"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("latentreward: error: names: there is no row 'lrm_pretrainin'")
