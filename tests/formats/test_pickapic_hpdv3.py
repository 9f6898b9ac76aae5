"""Readers against sample sets in the published layout, whose EXPECTED.json says what must come out.

``LATENTREWARD_SAMPLES_DIR`` names another folder of that layout, with other rows and other expectations.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentreward.data import (
    HPDv3Reader,
    LoadedPair,
    PairDataset,
    PairReader,
    PickAPicReader,
    PixelLoader,
    collate_pairs,
)
from tests.data.skipped_rows import skipped_rows
from tests.formats.conftest import check_rows

LOADER = PixelLoader(16, 16)
Open = Callable[..., PairReader]


@pytest.fixture
def pickapic(samples: Path) -> tuple[Open, dict[str, Any]]:
    def read(split: str, **options: Any) -> PairReader:
        return PickAPicReader(str(samples / "pickapic_v1"), split, **{"on_error": "skip", **options})

    return read, json.loads((samples / "EXPECTED.json").read_text())["pickapic_v1"]


@pytest.fixture
def hpdv3(samples: Path) -> tuple[Open, dict[str, Any]]:
    def read(split: str, **options: Any) -> PairReader:
        return HPDv3Reader(str(samples / "hpdv3"), split, **{"on_error": "skip", **options})

    return read, json.loads((samples / "EXPECTED.json").read_text())["hpdv3"]


def rows_in_file(reader: PairReader) -> int:
    return len(reader) + reader.skipped.total()


def unreadable_rows(reader: PairReader) -> list[int]:
    """Row numbers whose images are not read; the rest gives batches."""
    dataset = PairDataset(reader, LOADER)
    loaded = [item for n in range(len(dataset)) if isinstance(item := dataset[n], LoadedPair)]
    assert len(loaded) == len(dataset) - (reader.on_error == "skip") * dataset.skipped().total()
    batch = collate_pairs(loaded)
    assert batch.chosen.shape == batch.rejected.shape == (len(loaded), 3, 16, 16)
    assert batch.label.min() >= 0.5
    assert batch.label.max() <= 1
    return skipped_rows(dataset)


def test_pickapic_counts(pickapic) -> None:
    read, expected = pickapic
    for split in ("train", "validation_unique", "test_unique"):
        assert rows_in_file(read(split)) == expected[f"{split}_rows"]
    train = read("train")
    labels = [train[n].label_a for n in range(len(train))]
    assert labels.count(0.5) == expected["train_ties"]
    published = sum(label in (0, 1) for label in train.facts()["label_0"])  # also of rows labelled (1, 1)
    assert expected["train_strict_labels_0_or_1"] in (labels.count(0.0) + labels.count(1.0), published)
    flagged = rows_in_file(train) - train.remarks["unlabelled (has_label is not true)"]
    labelled = len(labels) - labels.count(None)
    assert expected["train_has_label"] in (flagged, labelled)  # flagged rows may have labels that contradict each other
    assert train.labelled().sum() == labelled


def test_pickapic_leaves_out_exactly_the_undecodable_rows(pickapic) -> None:
    read, expected = pickapic
    every_row = read("train", on_error="placeholder")
    assert len(every_row) == expected["train_rows"]
    assert unreadable_rows(every_row) == sorted(expected["undecodable_rows"])
    kept = read("train")
    if len(kept) == len(every_row):
        assert unreadable_rows(kept) == sorted(expected["undecodable_rows"])


@pytest.mark.parametrize("split", ["train", "validation_unique", "test_unique"])
def test_pickapic_records(pickapic, split: str) -> None:
    read, _ = pickapic
    reader = read(split)
    pairs = [reader[n] for n in range(len(reader))]
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    assert [pair.prompt for pair in pairs] == reader.prompts()
    facts = reader.facts()
    assert [(pair.model_a, pair.model_b) for pair in pairs] == list(
        zip(facts["model_a"], facts["model_b"], strict=True)
    )
    for pair, published in zip(pairs, facts["label_0"], strict=True):
        assert pair.label_a in (None, published)
    for pair in pairs:
        assert pair.label_a is None or 0 <= pair.label_a <= 1
        assert 0 < pair.weight <= 1
        assert pair.swapped().swapped() == pair


def test_hpdv3_counts(hpdv3) -> None:
    read, expected = hpdv3
    for split in ("all", "train", "test"):
        assert rows_in_file(read(split)) == expected[f"{split}_rows"]
    votes = [pair.votes for pair in read("all")]
    cast = sum(pair is not None and sum(pair) > 0 for pair in votes)
    assert expected["rows_with_votes"] in (cast, len(votes) - votes.count(None))  # (0, 0) is published, but no vote
    assert len(read("all", min_confidence=0.95)) == expected["kept_at_confidence_0_95_null_kept"]


def test_hpdv3_leaves_out_exactly_the_undecodable_rows(hpdv3) -> None:
    read, expected = hpdv3
    check_rows(unreadable_rows(read("all", on_error="placeholder")), expected, "undecodable_rows")


@pytest.mark.parametrize("split", ["all", "train", "test"])
def test_hpdv3_records(hpdv3, split: str) -> None:
    read, _ = hpdv3
    hard, soft = read(split, randomise_sides=False), read(split, randomise_sides=False, label="votes")
    randomised = read(split)
    facts = randomised.facts()
    for n, pair in enumerate(hard):
        row = randomised[n]
        told = {name: values[n] for name, values in facts.items()}
        assert (row.votes or (None, None)) == (told.get("votes_a"), told.get("votes_b"))
        assert (row.model_a, row.model_b, row.confidence) == (told["model_a"], told["model_b"], told.get("confidence"))
        assert pair.label_a == 1
        assert randomised[n] in (pair, pair.swapped())
        if pair.votes and sum(pair.votes):
            assert soft[n].label_a == pair.votes[0] / sum(pair.votes)
    unreadable_rows(read(split))
