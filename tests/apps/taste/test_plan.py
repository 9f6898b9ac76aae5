"""Steps are made anew where something they depend on has changed, and only there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.apps.taste.pairs import Picture, RatedPair, collect
from latentreward.apps.taste.plan import (
    ALIGN,
    CACHE,
    JUDGED,
    PICTURES,
    PROMPTS,
    REWARD,
    SCORES,
    Plan,
    family_of,
    find_base,
    prompts_of,
    write_pairs,
    write_prompts,
)
from latentreward.apps.taste.splitting import Split, split
from latentreward.core.errors import InputError
from tests.apps.taste.folders import sorted_folder

PLAN = Plan("sd_tiny", Path("/a b"), Path("/p"), None, "frozen", None, False, None, ["--trainer.max_epochs=3"], [], 4)


def changed(plan: Plan, seed: int = 0) -> set[str]:
    """Names of the steps that are others than those of :data:`PLAN` with prompts."""
    with_prompts = replace(PLAN, prompts=Path("/q")).steps(Path("/w"), 0)
    return {name for name, step in plan.steps(Path("/w"), seed).items() if step != with_prompts[name]}


def test_a_change_starts_what_depends_on_it() -> None:
    plan = replace(PLAN, prompts=Path("/q"))
    assert [*plan.steps(Path("/w"), 0)] == [CACHE, REWARD, SCORES, ALIGN, PICTURES]
    assert changed(PLAN) == set()  # an alignment that comes later finds the reward
    assert changed(replace(plan, prompts=Path("/other"))) == {ALIGN, PICTURES}
    assert changed(replace(plan, align=["--trainer.max_steps=1"])) == {ALIGN, PICTURES}
    assert changed(replace(plan, pictures=5)) == {PICTURES}
    assert changed(replace(plan, tuning="lora")) == {REWARD, SCORES, ALIGN, PICTURES}
    for other in (changed(replace(plan, folder=Path("/b"))), changed(replace(plan, size=64)), changed(plan, 1)):
        assert other == {CACHE, REWARD, SCORES, ALIGN, PICTURES}


def test_a_pipeline_is_told_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    assert find_base(str(tmp_path)).backbone == "sdxl" and find_base("sd35_tiny").size == 32
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match=r"base: '.*' is a FluxPipeline; taste takes StableDiffusionPipeline"):
        find_base(str(tmp_path))
    plan = replace(PLAN, base=str(tmp_path), gpu=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    command = plan.steps(Path("/w"), 0)[REWARD].arguments
    for argument in ("sd35_medium", "--model.backbone.source=" + str(tmp_path), "--trainer.precision=bf16-mixed"):
        assert any(argument in one for one in command)


def test_equal_pairs_are_written_once_and_prompts_are_kept_apart(tmp_path: Path) -> None:
    parts = split(collect(sorted_folder(tmp_path / "mine", 30, prompts=20)), 500, 0)
    first = write_pairs(tmp_path, parts)
    assert first == write_pairs(tmp_path, parts) != write_pairs(tmp_path, split(collect(tmp_path / "mine"), 500, 1))
    folder, line = write_prompts(tmp_path, prompts_of(parts, None, family_of("sd_tiny")), 0)
    trained, judged = (
        {json.loads(row)["prompt"] for row in (folder / name).read_text().splitlines()} for name in (PROMPTS, JUDGED)
    )
    assert len(trained) == 15 and len(judged) == 5 and not trained & judged and line.startswith("15 prompts")
    folder, line = write_prompts(tmp_path, ["a", "b"], 0)
    assert (folder / PROMPTS).read_text() == (folder / JUDGED).read_text() and "the same for the pictures" in line


def test_an_alignment_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sorted_folder(tmp_path / "mine", 20)
    with pytest.raises(SystemExit):
        main(["taste", str(tmp_path / "mine"), "--base=sd_tiny", "--align", f"--work={tmp_path}/work"])
    assert "align needs prompts, and no picture has a caption; give --prompts a file" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    one = RatedPair("", Picture("a", "a", ""), Picture("b", "b", ""), 1.0)
    with pytest.raises(InputError, match=r"prompts: .*missing.txt does not exist"):
        prompts_of(Split({"train": [one]}, ""), tmp_path / "missing.txt", family_of("sd_tiny"))
    with pytest.raises(InputError, match=r"prompts: .*/missing does not exist"):
        prompts_of(Split({"train": [one]}, ""), tmp_path / "missing", family_of("sd_tiny"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--epochs=0", "epochs is 0"),
        ("--size=13", "size: 13 is no multiple of the 4"),
        ("--pairs=3", "pairs=3 must be at least 20"),
        ("--base=/nowhere", "base: source='/nowhere' does not exist"),
    ],
)
def test_wrong_settings_are_named(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sorted_folder(tmp_path / "mine", 20)
    with pytest.raises(SystemExit):
        main(["taste", str(tmp_path / "mine"), "--base=sd_tiny", f"--work={tmp_path}/work", setting])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
