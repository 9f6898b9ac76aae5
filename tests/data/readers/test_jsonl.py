"""JSON lines of one's own: two ways to say who won, odd lines, paths that stay inside the root."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import JSONLPairReader, LoadedPair, PairDataset, PixelLoader, SkippedPair

PLAIN = {"prompt": "a cat", "image_a": "images/a.jpg", "image_b": "images/b.jpg", "label": 1.0}


@pytest.fixture
def write(tmp_path: Path, jpeg):
    def write_lines(*lines: dict[str, Any] | str, folder: str = "pairs") -> str:
        images = tmp_path / folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate("ab"):
            (images / f"{name}.jpg").write_bytes(jpeg((90 * number, 10, 10)))
        file = tmp_path / "pairs" / "own.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(file)

    return write_lines


def test_both_ways_to_say_who_won(write) -> None:
    winner_first = {"prompt": " x\n🦊", "chosen": "images/a.jpg", "rejected": "images/b.jpg", "pair_id": "mine"}
    extras = {"votes": [3, 1], "confidence": 0.9, "weight": 2}
    reader = JSONLPairReader(write(winner_first, "", {**PLAIN, **extras}), randomise_sides=False)
    assert reader.pair_ids() == ["mine", "own.jsonl:3"]
    assert reader.prompts() == [" x\n🦊", "a cat"]
    assert reader.labels().tolist() == [1.0, 1.0]
    first, second = reader[0], reader[1]
    assert (first.label_a, first.votes, first.confidence, first.weight) == (1.0, None, None, 1.0)
    assert (second.votes, second.confidence, second.weight, second.split) == ((3, 1), 0.9, 2.0, "train")
    assert (second.image_a.image_key, second.image_b.image_key) == ("images/a.jpg", "images/b.jpg")
    named = JSONLPairReader(write({**PLAIN, "split": "held_out"}, {**PLAIN, "split": 3}))
    assert [named[row].split for row in range(2)] == ["held_out", "train"]
    assert isinstance(PairDataset(reader, PixelLoader(8, 8))[0], LoadedPair)
    assert pickle.loads(pickle.dumps(reader))[1] == second


@pytest.mark.parametrize(
    ("value", "label"), [(0.0, 0.0), (0.25, 0.25), ("0.5", 0.5), ("a", 1.0), ("b", 0.0), ("tie", 0.5), (None, None)]
)
def test_labels(write, value, label) -> None:
    reader = JSONLPairReader(write({**PLAIN, "label": value}))
    assert reader[0].label_a == label
    assert reader.labelled().tolist() == [label is not None]
    assert dict(reader.remarks) == ({"unlabelled (no label)": 1} if label is None else {})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"source_image": "absent.png"}, "source_image"),
        ({"INPUT_IMG": {"bytes": None, "path": "a.png"}}, "INPUT_IMG"),
        ({"source": "in/a.JPG"}, "source"),
        ({"source": "laion"}, None),
        ({"source_images": []}, None),
    ],
)
def test_pictures_to_edit_are_ignored_with_a_remark_or_refused_under_other_names(write, changes, name) -> None:
    file = write({**PLAIN, **changes}, PLAIN)
    reader = JSONLPairReader(file, sources="ignore")
    assert dict(reader.remarks) == ({f"edit of {name!r}, a picture that is not read": 1} if name else {})
    assert [type(prompt) for prompt in reader.prompts()] == [str, str]
    if name in (None, "source_image"):
        assert not JSONLPairReader(file).remarks
        return
    remedy = f"'{name}' is a picture to edit, and source_images is read; rename it, or set sources: ignore"
    with pytest.raises(InputError, match=rf"^own\.jsonl:1: {remedy}; correct the row"):
        JSONLPairReader(file)
    skipping = JSONLPairReader(file, on_error="skip")
    assert (len(skipping), skipping.skipped.total()) == (1, 1)


def test_an_edit_carries_its_pictures_with_the_prompt(write, jpeg) -> None:
    both, one = ["images/a.jpg", "./images/b.jpg"], {"path": "images/a.jpg"}
    lines = [
        {**PLAIN, "source_images": both},
        {**PLAIN, "source_image": one},
        {**PLAIN, "source_image": both[1]},
        PLAIN,
    ]
    file = write(*lines)
    reader = JSONLPairReader(file)
    names = [("images/a.jpg", "images/b.jpg"), ("images/a.jpg",), ("images/b.jpg",), ()]
    for prompts in (reader.prompts(), [reader[row].prompt for row in range(4)]):
        assert [tuple(source.image_key for source in sources_of(prompt)) for prompt in prompts] == names
        assert all(str(prompt) == "a cat" for prompt in prompts)
    assert reader.groups() == [
        "a cat\nimages/a.jpg\nimages/b.jpg",
        "a cat\nimages/a.jpg",
        "a cat\nimages/b.jpg",
        "a cat",
    ]
    assert pickle.loads(pickle.dumps(reader))[0] == reader[0]
    (loaded,) = PairDataset(reader, PixelLoader(8, 8), [1])
    assert torch.equal(loaded.sources[0], loaded.pixels_a) and not torch.equal(loaded.sources[0], loaded.pixels_b)
    plain = JSONLPairReader(file, sources="ignore")
    assert [reader[row].image_a for row in range(4)] == [plain[row].image_a for row in range(4)]
    assert reader.pair_ids() == plain.pair_ids()
    assert plain.groups() == ["a cat"] * 4


TOO_MANY = ["images/a.jpg"] * 17


@pytest.mark.parametrize(
    ("value", "problem", "known_at_once"),
    [
        ("../outside.jpg", "source_images '../outside.jpg' leads out of", True),
        (["images/a.jpg", None], "source_images is None, not a path", True),
        (3, "source_images is 3, not a path", True),
        (TOO_MANY, "source_images has 17 pictures to edit, more than 16", True),
        ("images/absent.jpg", "missing file", False),
        (["images/a.jpg", "images/odd.jpg"], "truncated or damaged", False),
    ],
)
def test_pictures_to_edit_that_cannot_be_read_follow_on_error(write, tmp_path, value, problem, known_at_once) -> None:
    file = write({**PLAIN, "source_images": value}, {**PLAIN, "source_images": ["images/b.jpg"]})
    (tmp_path / "pairs/images/odd.jpg").write_bytes((tmp_path / "pairs/images/a.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match=rf"own\.jsonl:1: .*{problem}.*on_error") as error:
        reader = JSONLPairReader(file)
        assert not known_at_once
        PairDataset(reader, PixelLoader(8, 8))[0]
    assert "\n" not in str(error.value)
    reader = JSONLPairReader(file, on_error="skip")
    items = [*PairDataset(reader, PixelLoader(8, 8))]
    assert reader.skipped.total() + sum(isinstance(item, SkippedPair) for item in items) == 1
    assert items[-1].sources[0].shape == (3, 8, 8)
    reader = JSONLPairReader(file, on_error="placeholder")
    first = PairDataset(reader, PixelLoader(8, 8))[0]
    assert first.pair.label_a is None
    assert len(first.sources) == ((len(value) if isinstance(value, list) else 1) if value != TOO_MANY else 0)


def test_base64_in_the_place_of_a_path_is_named(write) -> None:
    text = "iVBORw0KGgo" + "A" * 50_000
    with pytest.raises(InputError, match=r"own.jsonl:1: chosen is .*, base64 text, not a path; write") as caught:
        JSONLPairReader(write({"prompt": "x", "chosen": text, "rejected": "images/b.jpg"}))
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match=r"^x{197}\.\.\.: "):
        reader = JSONLPairReader(write(PLAIN))
        reader.refuse("x" * 10_000, "a problem", "a reason")


def test_other_keys_of_unlabelled_rows_are_named(write) -> None:
    bare = {key: value for key, value in PLAIN.items() if key != "label"}
    counted = {**bare, "votes_a": 3, "votes_b": 1}
    reader = JSONLPairReader(write(counted, {**counted, "votes": [3, 1], "winner": "a"}, bare, {**PLAIN, "model": "x"}))
    (remark,) = reader.remarks
    assert reader.remarks[remark] == 3
    assert reader.named == {remark: ["own.jsonl:1", "own.jsonl:2", "own.jsonl:3"]}
    assert remark == (
        "unlabelled (a label is read from 'label', or from 'chosen' and 'rejected', not from 'votes_a' (2 rows), "
        "'votes_b' (2 rows), 'votes' (1 rows), 1 other keys)"
    )


UNNAMED = {key: value for key, value in PLAIN.items() if key != "prompt"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "row is no object"),
        ("[1, 2]", "row is no object"),
        ("[" * 9999, "row is no object"),
        (json.dumps(PLAIN)[:-1] + ', "label": 0}', "row is no object"),
        (json.dumps(PLAIN)[:-1] + ', "more": [{"a": 1, "\\u0061": 1}]}', "row is no object"),
        ({**PLAIN, "prompt": 3}, "prompt is no text"),
        ({"prompt_text": "a cat", **UNNAMED}, "prompt under another name"),
        ({**UNNAMED, "Description": "a cat"}, "prompt under another name"),
        ({**PLAIN, "label": 2}, "label not readable"),
        ({**PLAIN, "label": "left"}, "label not readable"),
        ({**PLAIN, "label": True}, "label not readable"),
        ({**PLAIN, "label": "0_1"}, "label not readable"),
        ({**PLAIN, "weight": -1}, "weight not readable"),
        ({**PLAIN, "weight": "heavy"}, "weight not readable"),
        ({**PLAIN, "pair_id": "first"}, "pair_id occurs twice"),
    ],
)
def test_odd_lines_follow_on_error(write, line, reason) -> None:
    file = write({**PLAIN, "pair_id": "first"}, line, PLAIN)
    reader = JSONLPairReader(file, on_error="skip")
    assert (reader.pair_ids(), dict(reader.skipped)) == (["first", "own.jsonl:3"], {reason: 1})
    assert reader.named == {reason: ["own.jsonl:2"]}
    reader = JSONLPairReader(file, on_error="placeholder")
    assert (reader[1].label_a, reader[1].pair_id, dict(reader.remarks)) == (None, "own.jsonl:2", {reason: 1})


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"prompt": None}, "null prompt read as empty"),
        ({"prompt": None, "text": "printed in the picture"}, "null prompt read as empty"),
        ({"votes": [1]}, "votes not readable"),
        ({"votes": "x"}, "votes not readable"),
        ({"votes": [1, -1]}, "votes not readable"),
        ({"confidence": 2}, "confidence not readable"),
        ({"confidence": "high"}, "confidence not readable"),
    ],
)
def test_remarks(write, changes, remark) -> None:
    reader = JSONLPairReader(write({**PLAIN, **changes}))
    assert (dict(reader.remarks), reader[0].label_a, reader[0].weight) == ({remark: 1}, 1.0, 1.0)
    assert reader[0].votes is reader[0].confidence is None


def test_byte_order_mark_and_surrogates(write) -> None:
    file = write('\ufeff{"prompt": "\\ud800x", "image_a": "a", "image_b": "b", "label": 1.0}')
    assert JSONLPairReader(file).prompts() == ["?x"]
