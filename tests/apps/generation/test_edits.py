"""Pictures of an editor: the list, the folder, the copies of what was edited."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from latentreward.apps.cli import main
from tests.alignment.modules.test_edits import edits
from tests.core.settings.test_refusals import refusal
from tests.diffusion.families.twins import TWINS

KLEIN = TWINS["klein_base"]
SMALL = ("--sampling.num_inference_steps=2", "--sampling.height=32", "--sampling.width=48", "--guidance_scale=1")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A list of two edits of unlike pictures with one text, and an edit with another."""
    rows = [{"prompt": str(edit), "source_images": [edit.sources[0].image_key]} for edit in edits(tmp_path)]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "edits.jsonl"


def test_generate_edits_each_picture(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(prompts), str(tmp_path / "out"), f"--policy.source={KLEIN.folder}", *SMALL]
    main(given)
    with (tmp_path / "out" / "images.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["prompt"] for row in rows] == ["make it red", "make it red", "remove the dog"]
    for number, row in enumerate(rows):
        (copy,) = json.loads(row["source_images"])
        assert (tmp_path / "out" / copy).read_bytes() == (tmp_path / f"{number}-0.png").read_bytes()
    shown = [(tmp_path / "out" / row["file"]).read_bytes() for row in rows[:2]]
    assert shown[0] != shown[1]
    main(given)
    assert "3 of 3 pictures are there already" in capsys.readouterr().out
    Image.new("RGB", (72, 64), "pink").save(tmp_path / "0-0.png")
    assert "0_make-it-red.png shows 'make it red', not" in refusal(capsys, *given)


def test_prompts_that_the_network_cannot_edit_are_refused_before_it_is_loaded(prompts: Path, tmp_path: Path, capsys):
    given = ["generate", str(prompts), str(tmp_path / "out"), *SMALL]
    flux = TWINS["flux1_dev"].folder
    said = refusal(capsys, *given, f"--policy.source={flux}")
    assert "prompts: 'make it red': FLUX.1 makes pictures from text alone, and 1 to edit were given" in said
    with prompts.open("a") as file:
        file.write('{"prompt": "a cat"}\n')
    told = "unlike numbers of pictures, first 0 ('a cat'), 1 ('make it red'); give a list for each number"
    assert told in refusal(capsys, *given, f"--policy.source={KLEIN.folder}")
