"""Steps are made anew where something they depend on has changed, and only there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from latentreward.apps.cli import main
from latentreward.apps.taste.pairs import RATINGS, Picture, RatedPair, collect
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
    fitting,
    prompts_of,
    write_pairs,
    write_prompts,
)
from latentreward.apps.taste.ratings import Ratings
from latentreward.apps.taste.splitting import Split, split
from latentreward.core.contracts import EditPrompt, ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.data.images import image_bytes
from tests.apps.taste.folders import edited_folder, sorted_folder
from tests.tiny_pipelines import pipeline_folder

PLAN = Plan(
    "sd_tiny", Path("/a b"), Path("/p"), None, "frozen", None, False, 10, None, ["--trainer.max_epochs=3"], [], 4
)


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


def test_prompts_carry_copies_of_their_own_pictures(tmp_path: Path) -> None:
    mine = edited_folder(tmp_path / "mine", [f"make it {number}" for number in range(3)])
    given = dict(zip(("a", "b", "c"), sorted((mine / "sources").iterdir()), strict=True))
    inside = ImageRef("", data=given["c"].read_bytes())  # as of parquet, without a name
    edits = [EditPrompt("a", [ImageRef("a.png", path=given["a"])]), EditPrompt("b", [ImageRef("b", path=given["b"])])]
    folder, _ = write_prompts(tmp_path, [*edits, EditPrompt("c", [inside])], 0)
    read = {prompt: sources_of(prompt) for prompt in read_prompts(str(folder / PROMPTS))}
    assert {str(prompt): image_bytes(image) for prompt, (image,) in read.items()} == {
        text: file.read_bytes() for text, file in given.items()
    }


def test_pairs_that_the_base_does_not_take_are_left_out(tmp_path: Path) -> None:
    ratings = Ratings(edited_folder(tmp_path, ["make it red"] * 24))
    while ratings.next is not None:
        ratings.rate(ratings.next.names, "a")
    (tmp_path / "sources/3.png").unlink()
    (tmp_path / "sources/5.png").write_text("no picture")
    lines = [json.loads(line) for line in (tmp_path / RATINGS).read_text().splitlines()]
    del lines[7]["source_images"]
    (tmp_path / RATINGS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = collect(tmp_path)
    assert any("sources/5.png" in remark for remark in found.remarks)
    editor = family_of(pipeline_folder("ip2p_sd15"))
    kept = fitting(found, editor)
    assert kept.remarks[-1] == "left out, InstructPix2Pix takes 1 pictures to edit; 1 pair with 0"
    assert len(kept.pairs) == len(found.pairs) - 1 and all(len(sources_of(pair.prompt)) == 1 for pair in kept.pairs)
    two = replace(found.pairs[0], prompt=EditPrompt("both", 2 * sources_of(found.pairs[0].prompt)))
    others = fitting(replace(found, pairs=[*found.pairs, two]), editor).remarks[-1]
    assert others == "left out, InstructPix2Pix takes 1 pictures to edit; 2 pairs with 0 or 2"
    told = "base: .* takes 0 pictures to edit; .* pairs with 1; give an editor for rated edits"
    with pytest.raises(InputError, match=told):
        fitting(found, family_of("sd_tiny"))
    plain = tmp_path / "plain.txt"
    plain.write_text("a cat")
    with pytest.raises(InputError, match="prompts: 'a cat': InstructPix2Pix takes 1 picture to edit, and 0 were given"):
        prompts_of(split(kept, 500, 0), plain, editor)


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
        ("--batch_size=0", "batch_size: 0"),
        ("--size=10000000", "size=10000000 must lie in [1, 4096]"),
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
