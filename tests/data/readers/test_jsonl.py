"""JSON lines of one's own: two ways to say who won, odd lines, paths that stay inside the root."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from latentreward.core.contracts import sources_of
from latentreward.data import JSONLPairReader, LoadedPair, PairDataset, PixelLoader

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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "row is no object"),
        ("[1, 2]", "row is no object"),
        ("[" * 9999, "row is no object"),
        (json.dumps(PLAIN)[:-1] + ', "label": 0}', "row is no object"),
        ({**PLAIN, "prompt": 3}, "prompt is no text"),
        ({**PLAIN, "label": 2}, "label not readable"),
        ({**PLAIN, "label": "left"}, "label not readable"),
        ({**PLAIN, "label": True}, "label not readable"),
        ({**PLAIN, "weight": -1}, "weight not readable"),
        ({**PLAIN, "pair_id": "first"}, "pair_id occurs twice"),
    ],
)
def test_odd_lines_follow_on_error(write, line, reason) -> None:
    file = write({**PLAIN, "pair_id": "first"}, line, PLAIN)
    reader = JSONLPairReader(file, on_error="skip")
    assert (reader.pair_ids(), dict(reader.skipped)) == (["first", "own.jsonl:3"], {reason: 1})
    reader = JSONLPairReader(file, on_error="placeholder")
    assert (reader[1].label_a, reader[1].pair_id, dict(reader.remarks)) == (None, "own.jsonl:2", {reason: 1})


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"prompt": None}, "null prompt read as empty"),
        ({"votes": [1]}, "votes not readable"),
        ({"votes": [1, -1]}, "votes not readable"),
        ({"confidence": 2}, "confidence not readable"),
    ],
)
def test_remarks(write, changes, remark) -> None:
    reader = JSONLPairReader(write({**PLAIN, **changes}))
    assert (dict(reader.remarks), reader[0].label_a, reader[0].weight) == ({remark: 1}, 1.0, 1.0)
    assert reader[0].votes is reader[0].confidence is None


def test_byte_order_mark_and_surrogates(write) -> None:
    file = write('\ufeff{"prompt": "\\ud800x", "image_a": "a", "image_b": "b", "label": 1.0}')
    assert JSONLPairReader(file).prompts() == ["?x"]
