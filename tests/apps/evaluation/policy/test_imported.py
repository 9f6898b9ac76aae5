"""Pictures that were made elsewhere find their prompts by the table of their folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.evaluation.policy.samples import find_pictures, import_pictures, match
from latentreward.core.contracts import EditPrompt, ImageRef, sources_of
from latentreward.core.errors import InputError
from latentreward.data.alignment.prompt_files import PromptRow

ROWS = [PromptRow("a cat"), PromptRow("two dogs, «x»"), PromptRow("a cat")]


def paint(path: Path, level: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)
    return path.name


def write_csv(folder: Path, rows: list[str], header: str = "file,prompt") -> None:
    (folder / "images.csv").write_text("\n".join([header, *rows]), encoding="utf-8")


def load(folder: Path, rows: list[PromptRow], wanted: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    found = import_pictures(folder, find_pictures(folder), rows, wanted)
    assert [*found] == wanted
    return {name: picture.file for name, picture in found.items()}


def edit(path: Path, text: str = "make it red") -> PromptRow:
    return PromptRow(EditPrompt(text, [ImageRef(path.name, path=path)]))


def test_a_table_names_pictures_by_their_prompt(tmp_path: Path) -> None:
    for number in range(5):
        paint(tmp_path / f"{number}.png", number)
    write_csv(
        tmp_path, ['3.png,"two dogs, «x»"', "0.png,a cat", "1.png,a cat", "2.png,a bird", '4.png,"two dogs, «x»"']
    )
    expected = {(0, 0): "0.png", (0, 1): "1.png", (1, 0): "3.png", (1, 1): "4.png"}
    assert load(tmp_path, ROWS[:2], [*expected]) == expected
    assert load(tmp_path, ROWS[:2], [(0, 0), (1, 0)]) == {(0, 0): "0.png", (1, 0): "3.png"}


def test_pictures_of_a_repeated_prompt_are_dealt_out(tmp_path: Path) -> None:
    for number in range(4):
        paint(tmp_path / f"{number}.png")
    lines = ["3.png,a cat,7,1", "1.png,a cat,2,1", "2.png,a cat,7,0", "0.png,a cat,2,0"]
    write_csv(tmp_path, lines, "file,prompt,place,image")
    expected = {(0, 0): "0.png", (0, 1): "1.png", (2, 0): "2.png", (2, 1): "3.png"}
    assert load(tmp_path, ROWS, [*expected]) == expected


def test_json_lines_and_numbers(tmp_path: Path) -> None:
    paint(tmp_path / "deep" / "a b.jpg")
    rows = [{"file": "deep/a b.jpg", "prompt": "a cat", "image": 3.0}]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(tmp_path, ROWS[:1], [(0, 3)]) == {(0, 3): "deep/a b.jpg"}


def test_edits_find_the_pictures_that_they_edit(tmp_path: Path) -> None:
    """Not by their place: the set of prompts is cut and in another order than the folder."""
    for number in range(4):
        paint(tmp_path / f"given{number}.png", 60 * number)
    folder = tmp_path / "made"
    for number in range(3):
        paint(folder / f"{number}.png")
        paint(folder / "sources" / f"{number}.png", 60 * number)
    lines = [f'{number}.png,make it red,{number},0,"[""sources/{number}.png""]"' for number in range(3)]
    write_csv(folder, lines, "file,prompt,place,image,source_images")
    rows = [edit(tmp_path / f"given{number}.png") for number in (2, 0)]
    assert load(folder, rows, [(0, 0), (1, 0)]) == {(0, 0): "2.png", (1, 0): "0.png"}
    told = find_pictures(folder)
    assert [sources_of(row.prompt)[0].path for row in told] == [folder / "sources" / f"{n}.png" for n in range(3)]
    expected = {(n, 0): f"{n}.png" for n in range(3)}
    assert load(folder, told, [*expected]) == expected
    with pytest.raises(InputError, match="lacks 1 of 2 pictures, first number 0 of prompt 0; add them"):
        load(folder, [edit(tmp_path / "given3.png"), edit(tmp_path / "given1.png")], [(0, 0), (1, 0)])
    assert match(told, [PromptRow("make it red")]) == {}  # a text alone is no edit
    (folder / "sources" / "1.png").unlink()
    with pytest.raises(InputError, match=r"images: .*images\.csv: row 2: .*sources/1\.png"):
        find_pictures(folder)


def test_what_cannot_be_read_is_counted_by_reason(tmp_path: Path) -> None:
    paint(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no picture")
    paint(tmp_path.parent / "outside.png")
    names = ["good.png", "cut.png", "text.png", "gone.png", "../outside.png"]
    write_csv(tmp_path, [f"{name},a cat" for name in names])
    with pytest.raises(InputError, match="lacks 4 of 5 pictures, first number 1 of prompt 0 ") as caught:
        load(tmp_path, ROWS[:1], [(0, number) for number in range(5)])
    assert "1 missing file" in str(caught.value) and "1 path outside the root" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "images.csv; write it, with columns file and prompt"),
        ("file,prompt\n", "images.csv holds no prompt"),
        ("path,prompt\na.png,x", "prompt 'x' has no file; write a column of paths"),
        ("file,prompt,place\na.png,x,first", "place 'first' .* is not a whole number"),
        ("file,prompt,image\na.png,x,1.5", "image '1.5' .* is not a whole number; write numbers from 0"),
        ("file,prompt,image\na.png,x,-1", "image '-1' .* is not a whole number"),
        ("file,prompt\na.png,a cat, asleep", r"images: .*images\.csv: line 2: more fields than the"),
    ],
)
def test_bad_folders_are_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "images.csv").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        find_pictures(tmp_path)
    assert "\n" not in str(caught.value)
