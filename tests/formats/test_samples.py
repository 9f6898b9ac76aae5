"""Readers against sample sets in the published layouts, whose EXPECTED.json says what must come out.

``LATENTREWARD_SAMPLES_DIR`` names another folder of that layout, with other rows and other expectations.
"""

import csv
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentreward.core.contracts import PreferencePair
from latentreward.data import (
    DiffusionRMReader,
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageError,
    ImageRewardDBReader,
    ImageRewardReader,
    LoadedPair,
    PairDataset,
    PairReader,
    PickAPicReader,
    PixelLoader,
    collate_pairs,
)
from latentreward.data.images import decode_latents
from tests.data.skipped_rows import skipped_rows
from tests.formats.conftest import SAMPLES, expected_of

READERS: dict[str, Callable[..., PairReader]] = {
    "pickapic_v1": PickAPicReader,
    "hpdv2": HPDv2Reader,
    "hpdv3": HPDv3Reader,
    "imagereward": ImageRewardReader,
    "imagerewarddb": ImageRewardDBReader,
    "genai_bench": GenAIBenchReader,
    "genai_bench_cmu": GenAIBenchCMUReader,
}
SPLITS = [(name, split) for name in ("pickapic_v1",) for split in ("train", "validation_unique", "test_unique")]
SPLITS += [("hpdv2", "train"), ("hpdv2", "test"), *(("hpdv3", split) for split in ("all", "train", "test"))]
SPLITS += [("imagereward", ""), ("imagerewarddb", "test"), ("genai_bench", "test"), ("genai_bench", "test_v1")]
SPLITS += [("genai_bench_cmu", "")]


def read(name: str, split: str = "", **options: Any) -> PairReader:
    return READERS[name](str(SAMPLES / name), *filter(None, [split]), **{"on_error": "skip", **options})


def rows_in_file(reader: PairReader) -> int:
    return len(reader) + reader.skipped.total()


def unreadable_rows(reader: PairReader) -> list[int]:
    """Row numbers whose images are not read; the labelled rest gives a batch."""
    dataset = PairDataset(reader, PixelLoader(16, 16))
    loaded = [item for n in range(len(dataset)) if isinstance(item := dataset[n], LoadedPair)]
    assert len(loaded) == len(dataset) - (reader.on_error == "skip") * dataset.skipped().total()
    batch = collate_pairs([item for item in loaded if item.pair.label_a is not None])
    assert batch.chosen.shape == batch.rejected.shape == (len(batch), 3, 16, 16)
    assert batch.label.min() >= 0.5
    return skipped_rows(dataset)


def counts(reader: PairReader) -> tuple[int, int]:
    """Ties, and pairs with a winner."""
    labels = reader.labels()
    return int((labels == 0.5).sum()), int(np.isin(labels, (0, 1)).sum())


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_what_is_told_of_all_rows_is_what_the_rows_say(name: str, split: str) -> None:
    """Here and in a worker; names are unique, facts have the sides of the rows, a group has one name."""
    reader = read(name, split)
    pairs = [reader[n] for n in range(len(reader))]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy[n] for n in range(len(reader))] == pairs
    assert [pair.prompt for pair in pairs] == reader.prompts()
    assert [pair.pair_id for pair in pairs] == reader.pair_ids()
    assert len(set(reader.pair_ids())) == len(pairs)
    labels = [np.nan if pair.label_a is None else pair.label_a for pair in pairs]
    np.testing.assert_array_equal(labels, reader.labels())
    np.testing.assert_array_equal(reader.labelled(), ~np.isnan(labels))
    check_facts(reader, pairs)
    for pair in pairs:
        assert pair.label_a is None or 0 <= pair.label_a <= 1
        assert 0 < pair.weight <= 1
        assert pair.swapped().swapped() == pair
    unreadable_rows(reader)


def check_facts(reader: PairReader, pairs: list[PreferencePair]) -> None:
    facts, unknown = reader.facts(), [None] * len(pairs)
    assert [pair.model_a for pair in pairs] == facts.get("model_a", unknown)
    assert [pair.model_b for pair in pairs] == facts.get("model_b", unknown)
    assert [pair.confidence for pair in pairs] == facts.get("confidence", unknown)
    votes = zip(facts.get("votes_a", unknown), facts.get("votes_b", unknown), strict=True)
    assert [pair.votes or (None, None) for pair in pairs] == list(votes)
    for pair, published in zip(pairs, facts.get("label_0", unknown), strict=True):
        assert published is None or pair.label_a in (None, published)
    groups: dict[str, set[str | None]] = {}
    for pair, group in zip(pairs, reader.groups(), strict=True):
        groups.setdefault(group, set()).add(pair.group_id)
    assert all(len(ids) == 1 for ids in groups.values())


def test_pickapic() -> None:
    expected = expected_of("pickapic_v1")
    for split in ("train", "validation_unique", "test_unique"):
        assert rows_in_file(read("pickapic_v1", split)) == expected[f"{split}_rows"]
    train = read("pickapic_v1", "train")
    labels = train.labels().tolist()
    assert labels.count(0.5) == expected["train_ties"]
    published = sum(label in (0, 1) for label in train.facts()["label_0"])  # also of rows labelled (1, 1)
    assert expected["train_strict_labels_0_or_1"] in (labels.count(0.0) + labels.count(1.0), published)
    flagged = rows_in_file(train) - train.remarks["unlabelled (has_label is not true)"]
    assert expected["train_has_label"] in (flagged, train.labelled().sum())  # labels may contradict each other
    every_row = read("pickapic_v1", "train", on_error="placeholder")
    assert len(every_row) == expected["train_rows"]
    assert unreadable_rows(every_row) == sorted(expected["undecodable_rows"])


def test_pickapic_without_images_has_the_labels_of_the_copy_with_them() -> None:
    table, images = (
        PickAPicReader(str(SAMPLES / name), "train", images=option, on_error="placeholder")
        for name, option in (("pickapic_v1_no_images", "none"), ("pickapic_v1", "read"))
    )
    assert len(table) == len(images) == expected_of("pickapic_v1")["train_rows"]
    np.testing.assert_array_equal(table.labels(), images.labels())
    assert table.prompts() == images.prompts()
    for n in range(len(table)):
        assert table[n].weight == images[n].weight
        assert table[n].image_a.data is None


def test_hpdv3() -> None:
    expected = expected_of("hpdv3")
    for split in ("all", "train", "test"):
        assert rows_in_file(read("hpdv3", split)) == expected[f"{split}_rows"]
    hard, soft = (read("hpdv3", "all", randomise_sides=False, label=label) for label in ("hard", "votes"))
    cast = [pair.votes for pair in hard if pair.votes is not None]
    voted = sum(sum(votes) > 0 for votes in cast)
    assert expected["rows_with_votes"] in (voted, len(cast))  # (0, 0) is published, but no vote
    assert len(read("hpdv3", "all", min_confidence=0.95)) == expected["kept_at_confidence_0_95_null_kept"]
    randomised = read("hpdv3", "all")
    for n, pair in enumerate(hard):
        assert pair.label_a == 1
        assert randomised[n] in (pair, pair.swapped())
        if pair.votes and sum(pair.votes):
            assert soft[n].label_a == pair.votes[0] / sum(pair.votes)
    found = unreadable_rows(read("hpdv3", "all", on_error="placeholder"))
    assert found == (sorted(expected["undecodable_rows"]) if expected["odd_rows"] else [])


def test_hpdv2() -> None:
    expected = expected_of("hpdv2")
    skipping, every_row = (read("hpdv2", "train", on_error=mode) for mode in ("skip", "placeholder"))
    assert rows_in_file(skipping) == len(every_row) == expected["train_rows"]
    odd = expected["odd_rows"]
    assert unreadable_rows(every_row) == (sorted(expected["undecodable_rows"]) if odd else [])
    assert np.flatnonzero(~every_row.labelled()).tolist() == (sorted(expected["unlabelled_rows"]) if odd else [])
    groups = read("hpdv2", "test")
    assert len(set(groups.groups())) <= expected["test_groups"]
    assert len(groups) == expected["test_pairs"]


def test_imagereward() -> None:
    expected, reader = expected_of("imagereward"), read("imagereward")
    assert (len(reader), *counts(reader)) == (expected["all_pairs"], expected["ties"], expected["strict_pairs"])
    by_group: dict[Any, set[Any]] = {}
    for pair in reader:
        by_group.setdefault(pair.group_id, set()).add(pair.label_a)
    assert sum(labels == {0.5} for labels in by_group.values()) == len(expected["all_tie_prompts"])
    missing, unreadable = expected["missing_file"], unreadable_rows(reader)
    lost = [n for n in range(len(reader)) if missing and str(missing) in f"{reader[n].image_a} {reader[n].image_b}"]
    assert set(lost) <= set(unreadable)
    if "unreadable_groups" not in expected:
        assert lost == unreadable


def test_imagerewarddb(tmp_path: Path) -> None:
    """The zip files, and folders that they were unpacked to, give the same."""
    expected, reader = expected_of("imagerewarddb"), read("imagerewarddb", "test")
    both = [
        (name, place) for name, _, ids in (one.rpartition(":") for one in reader.pair_ids()) for place in ids.split("-")
    ]
    assert (len({*both}), len(set(reader.groups()))) == (expected["rows"], expected["prompts"])
    assert counts(reader)[1] == expected["strict_pairs"]
    sample = SAMPLES / "imagerewarddb"
    (tmp_path / "metadata-test.parquet").write_bytes((sample / "metadata-test.parquet").read_bytes())
    for archive in (sample / "images" / "test").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(tmp_path / "images" / "test" / archive.stem)
    other = ImageRewardDBReader(str(tmp_path), "test", on_error="skip")
    assert (other.pair_ids(), other.prompts()) == (reader.pair_ids(), reader.prompts())
    np.testing.assert_array_equal(other.labels(), reader.labels())
    if not reader.remarks:  # where each path names its part
        assert unreadable_rows(other) == unreadable_rows(reader)


def test_genai_bench() -> None:
    expected, reader = expected_of("genai_bench"), read("genai_bench", "test")
    assert rows_in_file(reader) == expected["test_rows"]
    votes = Counter(reader.facts()["vote"])
    for kind in ("leftvote", "rightvote", "tievote", "bothbad_vote"):
        assert votes[kind] == expected["votes"].get(kind, 0)
    assert counts(reader) == (votes["tievote"] + votes["bothbad_vote"], votes["leftvote"] + votes["rightvote"])
    unreadable = unreadable_rows(reader)
    assert unreadable == (sorted(expected["undecodable_rows"]) if expected["odd_rows"] else [])
    strict = np.flatnonzero(np.isin(reader.labels(), (0, 1)))
    assert len(set(strict) - set(unreadable)) == expected["strict_decodable"]


def test_genai_bench_cmu() -> None:
    expected, reader = expected_of("genai_bench_cmu"), read("genai_bench_cmu")
    assert (len(set(reader.groups())), len(reader)) == (expected["rows"], expected["pairs"])
    assert counts(reader) == (expected["ties"], expected["strict"])
    unreadable_rows(reader)


def is_whole(reader: PairReader, row: int) -> bool:
    """Whether a row is there and both of its latents decode."""
    pair = reader[row]
    try:
        return pair.label_a is not None and all(decode_latents(image).ndim for image in (pair.image_a, pair.image_b))
    except ImageError:
        return False


def test_diffusion_rm() -> None:
    """Exactly the bad rows of the index are refused; without it every row of the files is read."""
    root, expected = str(SAMPLES / "diffusion_rm"), expected_of("diffusion_rm")
    reader, kept = (DiffusionRMReader(root, on_error=mode) for mode in ("placeholder", "skip"))
    assert len(reader) == rows_in_file(kept) == expected["index_rows"]
    with Path(root, "bucket_index.csv").open(newline="") as stream:
        place = {f"bucket_index.csv:{row['global_id']}": number for number, row in enumerate(csv.DictReader(stream))}
    bad = [row for row in range(len(reader)) if not is_whole(reader, row)]
    stated = {str(row) for row in expected["bad_index_rows"]}  # by number, as row → kind, or by as many words
    assert len(bad) == len(expected["bad_index_rows"])
    if all(number.isdecimal() for number in stated):
        assert {str(place[reader.pair_ids()[row]]) for row in bad} == stated
    names = {reader.pair_ids()[row] for row in range(len(reader)) if row not in bad}
    assert {kept.pair_ids()[row] for row in range(len(kept)) if is_whole(kept, row)} == names
    every = DiffusionRMReader(root, None, on_error="skip", randomise_sides=False)
    assert len(every) == expected["rows"]
    for number, prompt in enumerate(every.prompts()):
        assert ((pair := every[number]).prompt, pair.label_a) == (prompt, 1.0)
        if is_whole(every, number):
            assert decode_latents(pair.image_a).shape == decode_latents(pair.image_b).shape
