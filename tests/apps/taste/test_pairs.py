"""Pairs of a folder: by name, all against all, from ratings; what cannot be used is named and the rest goes on."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from latentreward.apps.taste.pairs import RATINGS, collect, from_ratings, lines
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader
from tests.apps.taste.folders import draw, sorted_folder, unsorted_folder


def rated(folder: Path, *rows: dict[str, object] | str) -> None:
    (folder / RATINGS).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def test_equal_names_are_pairs_and_captions_their_prompts(tmp_path: Path) -> None:
    found = collect(sorted_folder(tmp_path, 25, prompts=5))
    assert len(found.pairs) == 25 and found.remarks == [] and "by file name" in found.how
    assert {(Path(pair.a.path).name, pair.a.path[:6], pair.b.path[:8], pair.label) for pair in found.pairs} == {
        (f"{number:03}.png", "chosen", "rejected", 1.0) for number in range(25)
    }
    assert {pair.prompt for pair in found.pairs} == {f"prompt {number}" for number in range(5)}


def test_what_cannot_be_used_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    sorted_folder(tmp_path, 30)
    (tmp_path / "chosen" / "000.png").write_bytes(b"no picture")
    shutil.copy(tmp_path / "chosen" / "001.png", tmp_path / "rejected" / "001.png")
    (tmp_path / "rejected" / "002.png").unlink()
    draw(tmp_path / "chosen" / "003.jpg", 99)
    shutil.copy(tmp_path / "chosen" / "004.png", tmp_path / "chosen" / "005.png")
    draw(tmp_path / "chosen" / ".thumbnails" / "006.png", 98)
    draw(tmp_path.parent / f"{tmp_path.name}-elsewhere.png", 97)
    (tmp_path / "chosen" / "007.png").unlink()
    (tmp_path / "chosen" / "007.png").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere.png")
    found = collect(tmp_path)
    assert len(found.pairs) == 26
    told = "; ".join(found.remarks)
    assert "cannot be read: 2: chosen/000.png (unknown image format), chosen/007.png (path outside the root)" in told
    assert "a picture paired with itself: 1: chosen/001.png and rejected/001.png" in told
    assert "only on one side: 3: 000, 002, 007" in told
    assert "the same name with another ending: 1: chosen/003.png" in told
    same = ("chosen/001.png = rejected/001.png", "chosen/004.png = chosen/005.png")
    assert all(one in told for one in ("the same bytes count as one picture: 2: ", *same))
    by_name = {pair.b.path: pair for pair in found.pairs}
    assert by_name["rejected/004.png"].a.content == by_name["rejected/005.png"].a.content


def test_a_caption_behind_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    """A folder of a stranger could bring a private text onto the page."""
    sorted_folder(tmp_path / "mine", 20, prompts=1)
    (tmp_path / "private.txt").write_text("a secret")
    (tmp_path / "mine" / "chosen" / "000.txt").unlink()
    (tmp_path / "mine" / "chosen" / "000.txt").symlink_to(tmp_path / "private.txt")
    assert [pair.prompt for pair in collect(tmp_path / "mine").pairs] == ["", *["prompt 0"] * 19]


def test_names_that_do_not_match_compare_all_with_all(tmp_path: Path) -> None:
    for number in range(6):
        draw(tmp_path / "chosen" / f"good{number}.png", number)
        draw(tmp_path / "rejected" / f"bad{number}.png", 10 + number)
    shutil.copy(tmp_path / "chosen" / "good0.png", tmp_path / "rejected" / "bad0.png")
    found = collect(tmp_path)
    assert len(found.pairs) == 25 and "do not match" in found.how
    assert any("both chosen and rejected: 1: chosen/good0.png" in remark for remark in found.remarks)


def test_all_against_all_keeps_to_one_caption_where_both_sides_have_it(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / "chosen" / f"good{number}.png", number, f"prompt {number % 2}")
        draw(tmp_path / "rejected" / f"bad{number}.png", 20 + number, f"Prompt  {number % 2}")
    found = collect(tmp_path)
    assert Counter(pair.prompt for pair in found.pairs) == {"prompt 0": 36, "prompt 1": 36}
    for side in "ab":
        assert {*Counter(getattr(pair, side).path for pair in found.pairs).values()} == {6}
    assert len({pair.names for pair in found.pairs}) == 72
    for number in range(12):
        (tmp_path / "rejected" / f"bad{number}.txt").write_text(f"another {number}")
    found = collect(tmp_path)
    assert {pair.prompt for pair in found.pairs} == {""} and "captions are not used" in found.how


def test_ratings_count_and_odd_lines_are_named(tmp_path: Path) -> None:
    unsorted_folder(tmp_path, 24)
    (tmp_path / "023.png").write_bytes(b"")
    rows = [{"image_a": f"{n:03}.png", "image_b": f"{n + 1:03}.png", "label": "ab"[n % 2]} for n in range(22)]
    rows[0]["label"] = "tie"
    odd = (
        {"image_a": "022.png", "image_b": "023.png", "label": "a"},
        {"image_a": "000.png", "image_b": "000.png", "label": 1},
    )
    rated(tmp_path, *rows, *odd, "{broken", {"image_a": "../secret.png", "image_b": "001.png", "label": "a"})
    found = collect(tmp_path)
    assert len(found.pairs) == 22 and found.pairs[0].label == 0.5
    assert {pair.label for pair in found.pairs[1:]} == {1.0}
    assert (found.pairs[1].a.path, found.pairs[1].b.path) == ("002.png", "001.png")
    told = "; ".join(found.remarks)
    for part in (
        "ratings.jsonl: rows left out: 1: row 25 (no JSON at character 2)",
        "023.png",
        "../secret.png",
        "itself: 1: 000.png and 000.png",
        "picture: 2",
    ):
        assert part in told


def test_a_labelling_tool_s_table_is_taken_by_its_columns_and_labels(tmp_path: Path) -> None:
    unsorted_folder(tmp_path, 24)
    answers = ("left", "right", "tie")
    lines = ["links;rechts;text;answer", *(f"{n:03}.png;{n + 1:03}.png;ein Hügel;{answers[n % 3]}" for n in range(21))]
    (table := tmp_path / "labels.csv").write_text("\n".join([*lines, "000.png;002.png;;left", ""]), encoding="utf-8")
    columns = {"image_a": "links", "image_b": "rechts", "prompt": "text", "label": "answer"}
    found = collect(table, columns, {"left": "a", "right": "b", "tie": "tie"})
    assert found.how == "pairs of labels.csv"
    assert found.remarks == ["pairs without a caption, which are kept: 1: 000.png"]
    assert [(*pair.names, pair.label) for pair in found.pairs[:3]] == [
        ("000.png", "001.png", 1.0), ("002.png", "001.png", 1.0), ("002.png", "003.png", 0.5)
    ]  # fmt: skip
    for wrong, told in (
        ({"image_a": "linsk"}, r"no column 'linsk' in .* did you mean 'links'"),
        ({"prompt": "text"}, "no columns chosen and rejected, or image_a and image_b"),
        ({}, "no column prompt"),
    ):
        with pytest.raises(InputError, match=told):
            collect(table, wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "is not a folder"),
        (lambda folder: None, "has no pictures"),
        (lambda folder: unsorted_folder(folder, 1), "has 1 picture"),
        (lambda folder: draw(folder / "chosen" / "1.png", 1), "but not both chosen/ and rejected/"),
        (lambda folder: sorted_folder(folder, 19), "gives 19 pairs"),
    ],
)
def test_a_folder_that_gives_too_little_is_refused(tmp_path: Path, make, message: str) -> None:
    make(folder := tmp_path / "mine") if (tmp_path / "mine").mkdir() is None else None
    with pytest.raises(InputError, match=message):
        collect(folder)


def test_written_lines_are_what_the_reader_takes(tmp_path: Path) -> None:
    folder = sorted_folder(tmp_path / "mine", 20, prompts=3)
    pairs = list(collect(folder).pairs)
    (tmp_path / "pairs.jsonl").write_text(lines({"train": pairs[:15], "held_out": [*pairs[15:], pairs[15]]}))
    reader = JSONLPairReader(str(tmp_path / "pairs.jsonl"), str(folder))
    assert len(reader) == 21 and not reader.skipped
    assert [reader[row].split for row in (0, 15)] == ["train", "held_out"]
    assert reader.pair_ids()[-1] == f"{reader.pair_ids()[15]}-2"


def test_edits_are_left_out_since_a_reward_of_texts_would_be_trained_on_them(tmp_path: Path) -> None:
    unsorted_folder(tmp_path, 4)
    row = {"prompt": "make it red", "image_a": "000.png", "image_b": "001.png", "label": "b"}
    rated(tmp_path, {**row, "source_images": ["002.png"]}, row)
    found = from_ratings(tmp_path / RATINGS)
    assert len(found.pairs) == 1 and any("the result of an edit" in remark for remark in found.remarks)
