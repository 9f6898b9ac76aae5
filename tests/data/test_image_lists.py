"""Images with prompts from folders, patterns and lists: their order, their prompts, and what is refused or listed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.generation.image_folder import ImageFolder, draw_images
from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import ImageError, decode_image
from latentreward.data.image_lists import ImageList, read_images


def picture(path: Path, prompt: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 7, 3), 90, np.uint8)).save(path)
    if prompt is not None:
        path.with_suffix(".txt").write_text(prompt)
    return path


def prompts(images: ImageList) -> dict[str, str | None]:
    return {row.name: row.prompt if row.problem is None else None for row in images.rows}


@pytest.fixture
def pics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures, each with its text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "sub/deep/c.webp", "sub/a.bmp"):
        picture(tmp_path / "pics" / name, f"prompt of {name}\n")
    return tmp_path / "pics"


def test_a_folder_is_read_with_what_is_below_it_sorted(pics: Path) -> None:
    (pics / "notes.txt").write_text("no picture")
    (pics / "._b.png").write_bytes(b"what macOS leaves")
    images = read_images("pics")
    assert [row.name for row in images.rows] == ["a.JPG", "b.png", "sub/a.bmp", "sub/deep/c.webp"]
    assert all(row.prompt == f"prompt of {row.name}" for row in images.rows)
    assert all(decode_image(row.ref()).size == (7, 5) for row in images.rows)
    assert images.remarks == ()
    assert read_images(str(pics)).rows[1].name == "b.png"
    assert read_images("pics/../pics/").rows[1].name == "b.png"


def test_text_beside_a_picture_is_taken_whole_but_for_its_last_line_break(pics: Path) -> None:
    (pics / "b.txt").write_bytes(b"\xef\xbb\xbf two\r\nlines \r\n")
    (pics / "a.txt").write_bytes(b"caf\xe9")
    images = read_images("pics")
    found = prompts(images)
    odd = next(row for row in images.rows if row.name == "a.JPG")
    assert (odd.problem, odd.detail) == ("unreadable caption", "a.txt beside it is not UTF-8 at byte 4")
    assert found["b.png"] == " two\r\nlines "
    assert found["a.JPG"] is None


def test_tables_of_a_folder(tmp_path: Path) -> None:
    """metadata.csv and metadata.jsonl as imagefolder has them, captions.jsonl as our pairs in folders have it."""
    for name in ("1.png", "sub/2.png", "sub/3.png", "sub/4.png", "5.png"):
        picture(tmp_path / name)
    (tmp_path / "5.txt").write_text("the text beside wins")
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"one, two"\nsub/2.png,from above\n5.png,table\n')
    (tmp_path / "captions.jsonl").write_text(
        '{"name": "sub/3", "prompt": "three"}\n{"name": "gone", "prompt": ""}\n{\n'
    )
    images = read_images(str(tmp_path))
    assert prompts(images) == {
        "1.png": "one, two",
        "5.png": "the text beside wins",
        "sub/2.png": "from above",
        "sub/3.png": "three",
        "sub/4.png": None,
    }
    assert images.rows[-1].problem == "no prompt"
    assert images.rows[-1].detail.startswith("no 4.txt beside it")
    assert images.remarks == (f"{tmp_path}/captions.jsonl: line 3: cut off",)


@pytest.mark.parametrize("table", ["metadata.csv", "captions.jsonl"])
def test_unlike_prompts_of_a_picture_in_one_table_are_its_problem(tmp_path: Path, table: str) -> None:
    given = [("1.png", "one"), ("2.png", "two"), ("1.png", "uno"), ("2.png", "two"), ("1.png", "one")]
    picture(tmp_path / "1.png"), picture(tmp_path / "2.png")
    lines = [json.dumps({"name": name, "prompt": text}) for name, text in given]
    lines = lines if table.endswith("jsonl") else ["name,prompt", *map(",".join, given)]
    (tmp_path / table).write_text("\n".join(lines))
    one, two = read_images(str(tmp_path)).rows
    assert (one.problem, one.detail) == ("unreadable caption", f"{table} has 'one' and 'uno' for it")
    assert (two.problem, two.prompt) == (None, "two")


def test_a_folder_without_any_prompt_is_refused(pics: Path) -> None:
    for text in pics.rglob("*.txt"):
        text.unlink()
    with pytest.raises(
        InputError, match=r"none of 4 pictures in pics has a prompt; put NAME\.txt .*--prompt$"
    ) as error:
        read_images("pics")
    assert "\n" not in str(error.value)
    (pics / "metadata.csv").write_text("file_name,label\na.bmp,3\n")
    with pytest.raises(InputError, match=r"pics/metadata\.csv has no column prompt, caption or text"):
        read_images("pics")


def test_patterns(pics: Path) -> None:
    assert [row.name for row in read_images("pics/**/*.*").rows] == ["a.JPG", "b.png", "sub/a.bmp", "sub/deep/c.webp"]
    assert prompts(read_images("pics/sub/*.bmp")) == {"a.bmp": "prompt of sub/a.bmp"}
    assert [row.name for row in read_images(f"{pics}/*").rows] == ["a.JPG", "b.png"]
    assert [row.name for row in read_images("*/[ab].*").rows] == ["pics/a.JPG", "pics/b.png"]
    (pics / "sub" / "a.txt").unlink()
    (pics / "metadata.csv").write_text("file_name,prompt\nsub/a.bmp,from the table above\n")
    assert prompts(read_images("pics/*/a.bmp")) == {"sub/a.bmp": "from the table above"}


def test_links_and_names_that_are_no_text(tmp_path: Path) -> None:
    away = picture(tmp_path / "away" / "far.png", "far")
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "link.png").symlink_to(away)
    (tmp_path / "pics" / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "pics" / "folder").symlink_to(away.parent)
    picture(tmp_path / "pics" / "x.png").rename(tmp_path / "pics" / os.fsdecode(b"\xff.png"))
    images = read_images(str(tmp_path / "pics"), "p")
    assert [row.name for row in images.rows] == ["broken.png", "folder/far.png", "link.png", "?.png"]
    assert all(decode_image(row.ref()).size == (7, 5) for row in images.rows[1:])
    with pytest.raises(ImageError, match="missing file"):
        decode_image(images.rows[0].ref())


ROWS = [("a.JPG", "one"), ("sub/a.bmp", 'two, "quoted"\nlines'), ("a.JPG", "one"), ("./b.png", "")]


@pytest.mark.parametrize("columns", [("image", "prompt"), ("file_name", "caption"), ("path", "text"), ("x", "y")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_lists_keep_their_rows_and_copies(pics: Path, suffix: str, columns: tuple[str, str]) -> None:
    if suffix == ".csv":
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [columns, *ROWS]]
        text = "\n".join(quoted) + "\n"
    else:
        text = "".join(json.dumps({**dict(zip(columns, row, strict=True)), "more": [1]}) + "\n\n" for row in ROWS)
    (pics / f"list{suffix}").write_text("\ufeff" + text)
    named = columns if columns == ("x", "y") else (None, None)
    images = read_images(f"pics/list{suffix}", None, *named)
    assert [(row.name, row.prompt) for row in images.rows] == ROWS
    assert all(decode_image(row.ref()).size == (7, 5) for row in images.rows)
    assert {row.prompt for row in read_images(f"pics/list{suffix}", "all", named[0]).rows} == {"all"}


def test_a_list_may_be_json_or_tsv_and_tells_of_pictures_that_are_not_read(pics: Path) -> None:
    rows = [{"image": "a.JPG", "prompt": 'one "red" cat'}, {"image": "b.png", "prompt": "two", "input_image": "c.png"}]
    (pics / "list.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (pics / "list.tsv").write_text('image\tprompt\tsource_img\na.JPG\tone "red" cat\t\nb.png\ttwo\tc.png\n')
    for name, column in (("list.json", "input_image"), ("list.tsv", "source_img")):
        images = read_images(f"pics/{name}")
        assert {row.name: row.prompt for row in images.rows} == {row["image"]: row["prompt"] for row in rows}
        first, second = images.rows
        assert (first.problem, second.problem) == (None, "edit of a picture in a field that is not read")
        remedy = "source_images is read; rename it, or leave the column out"  # lists have no sources: ignore
        assert second.detail == f"{column!r} is a picture to edit, and {remedy}"


def test_an_image_of_a_list_carries_the_pictures_that_it_is_an_edit_of(pics: Path) -> None:
    rows = [{"image": "a.JPG", "prompt": "two", "source_images": ["b.png", "a.JPG"]}, {"image": "b.png", "prompt": "x"}]
    (pics / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (pics / "list.csv").write_text('image,prompt,source_images\na.JPG,two,"[""b.png"", ""a.JPG""]"\nb.png,x,\n')
    for name in ("list.jsonl", "list.csv"):
        first, second = read_images(f"pics/{name}").rows
        assert [source.image_key for source in sources_of(first.prompt)] == ["b.png", "a.JPG"]
        assert decode_image(sources_of(first.prompt)[0]).size == (7, 5)
        assert type(second.prompt) is str
        assert sources_of(read_images(f"pics/{name}", "all").rows[0].prompt) == sources_of(first.prompt)
    (pics / "metadata.jsonl").write_text(json.dumps({"file_name": "a.JPG", "prompt": "x", "source_image": "b.png"}))
    for text in pics.glob("*.txt"):
        text.unlink()
    listed = {row.name: row.prompt for row in read_images(str(pics)).rows}
    assert [source.image_key for source in sources_of(listed["a.JPG"])] == ["b.png"]
    rows = [{**rows[0], "source_images": value} for value in (["../a.png"], [3], ["b.png"] * 17)]
    (pics / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    outside, *others = read_images("pics/list.jsonl").rows
    with pytest.raises(ImageError, match="path outside the root"):
        decode_image(sources_of(outside.prompt)[0])
    assert [row.problem for row in others] == ["pictures to edit not readable"] * 2


def test_bad_rows_are_listed_with_their_lines(pics: Path) -> None:
    lines = [
        {"image": "a.JPG", "prompt": "fine"},
        {"image": "a.JPG", "prompt": None},
        {"image": "a.JPG"},
        {"image": 7, "prompt": "x"},
        {"image": "a\0.png", "prompt": "x"},
        {"prompt": "x"},
        ["a.JPG", "x"],
    ]
    (pics / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"image": \n')
    rows = read_images("pics/list.jsonl").rows
    assert [row.problem for row in rows] == [None, *["no prompt"] * 2, *["no image"] * 3, *["unreadable row"] * 2]
    assert [row.detail.split(":")[0] for row in rows[1:]] == [f"line {number}" for number in range(2, 9)]
    (pics / "list.csv").write_text("image,prompt\na.JPG,fine\nb.png\n\nb.png,x,y\n,x\n")
    rows = read_images("pics/list.csv").rows
    assert [(row.problem, row.detail.split(":")[0]) for row in rows] == [
        (None, ""),
        ("no prompt", "line 3"),
        ("unreadable row", "line 5"),
        ("no image", "line 6"),
    ]


def test_what_generate_wrote(tmp_path: Path) -> None:
    import torch

    folder = ImageFolder(tmp_path / "out", {"seed": 0})
    names = [(0, 0), (0, 1), (1, 0)]
    prompts = ["a cat", "a cat", "two\ndogs"]
    folder.add(draw_images(names, prompts, torch.zeros(3, 3, 16, 16), None, seed=0))
    folder.write_grid(names)
    for source in ("out", "out/images.csv"):
        rows = read_images(str(tmp_path / source)).rows
        assert [row.prompt for row in rows] == ["a cat", "a cat", "two\ndogs"]
        assert all(decode_image(row.ref()).size == (16, 16) for row in rows)


def test_a_prompt_beyond_the_limit_is_a_row_without_one(pics: Path) -> None:
    picture = sorted(pics.rglob("*.png"))[0]
    picture.with_suffix(".txt").write_text("x" * 10_001)
    (row,) = [row for row in read_images(str(pics)).rows if row.path == str(picture)]
    assert (row.problem, row.prompt) == ("prompt too long", "")
    assert row.detail.startswith("10001 characters, more than max_prompt_chars=10000: ")
    (row,) = [row for row in read_images(str(pics), max_prompt_chars=20_000).rows if row.path == str(picture)]
    assert row.problem is None
