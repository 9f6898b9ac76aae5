"""Readers of ranked and rated images against sample sets in the published layouts; see test_pickapic_hpdv3.py."""

import json
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentreward.core.contracts import PreferencePair
from latentreward.data import (
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    LoadedPair,
    PairDataset,
    PairReader,
    PixelLoader,
    collate_pairs,
)
from tests.data.skipped_rows import skipped_rows
from tests.formats.conftest import COMMITTED, check_rows
from tests.formats.odd_groups import write_all

LOADER = PixelLoader(16, 16)


@pytest.fixture(scope="module", params=["given", "odd"])
def sets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder with one sub-folder per format, and what must come out of each."""
    if request.param == "odd":
        root = tmp_path_factory.mktemp("odd_groups")
        return root, write_all(root)
    root = Path(os.environ.get("LATENTREWARD_SAMPLES_DIR", COMMITTED))
    return root, json.loads((root / "EXPECTED.json").read_text())


def unreadable_rows(reader: PairReader) -> list[int]:
    """Row numbers whose images are not read; the labelled rest gives a batch."""
    dataset = PairDataset(reader, LOADER)
    loaded = [item for n in range(len(dataset)) if isinstance(item := dataset[n], LoadedPair)]
    batch = collate_pairs([item for item in loaded if item.pair.label_a is not None])
    assert batch.chosen.shape == batch.rejected.shape == (len(batch), 3, 16, 16)
    return skipped_rows(dataset)


def counts(reader: PairReader) -> tuple[int, int]:
    """Ties, and pairs with a winner."""
    labels = reader.labels()
    return int((labels == 0.5).sum()), int(np.isin(labels, (0, 1)).sum())


def number_of_groups(reader: Any) -> int:
    """Groups that were kept, but for those of one image, which have no pair."""
    return len(set(reader.groups()))


def check_records(reader: PairReader) -> None:
    """What is told without fetching rows is what the rows say, here and in a worker; names are unique."""
    pairs = [reader[n] for n in range(len(reader))]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy[n] for n in range(len(reader))] == pairs
    assert [pair.prompt for pair in pairs] == reader.prompts()
    assert [pair.pair_id for pair in pairs] == reader.pair_ids()
    assert len(set(reader.pair_ids())) == len(pairs)
    check_facts(reader, pairs)
    labels = [np.nan if pair.label_a is None else pair.label_a for pair in pairs]
    np.testing.assert_array_equal(labels, reader.labels())
    np.testing.assert_array_equal(reader.labelled(), ~np.isnan(labels))
    for pair in pairs:
        assert pair.label_a in (0, 0.5, 1, None)
        assert pair.swapped().swapped() == pair


def check_facts(reader: PairReader, pairs: list[PreferencePair]) -> None:
    """Facts have the sides of the rows; rows with one group_id are of one group."""
    facts = reader.facts()
    unknown = [None] * len(pairs)
    assert [pair.model_a for pair in pairs] == facts.get("model_a", unknown)
    assert [pair.model_b for pair in pairs] == facts.get("model_b", unknown)
    if "votes_a" in facts:
        votes = zip(facts["votes_a"], facts["votes_b"], strict=True)
        assert [pair.votes or (None, None) for pair in pairs] == list(votes)
    groups: dict[str, set[str | None]] = {}
    for pair, group in zip(pairs, reader.groups(), strict=True):
        groups.setdefault(group, set()).add(pair.group_id)
    assert all(len(ids) == 1 for ids in groups.values())


def test_hpdv2_train(sets) -> None:
    root, expected = sets[0] / "hpdv2", sets[1]["hpdv2"]
    skipping, every_row = (HPDv2Reader(str(root), "train", on_error=mode) for mode in ("skip", "placeholder"))
    assert len(skipping) + skipping.skipped.total() == len(every_row) == expected["train_rows"]
    check_rows(unreadable_rows(every_row), expected, "undecodable_rows")
    check_rows(np.flatnonzero(~every_row.labelled()).tolist(), expected, "unlabelled_rows")
    unreadable_rows(skipping)
    check_records(skipping)


def test_hpdv2_test(sets) -> None:
    root, expected = sets[0] / "hpdv2", sets[1]["hpdv2"]
    reader = HPDv2Reader(str(root), "test", on_error="skip")
    assert number_of_groups(reader) <= expected["test_groups"]
    assert len(reader) == expected["test_pairs"]
    check_records(reader)
    unreadable_rows(reader)


def test_imagereward(sets) -> None:
    root, expected = sets[0] / "imagereward", sets[1]["imagereward"]
    reader = ImageRewardReader(str(root), on_error="skip")
    assert len(reader) == expected["all_pairs"]
    assert counts(reader) == (expected["ties"], expected["strict_pairs"])
    by_group: dict[Any, set[Any]] = {}
    for pair in reader:
        by_group.setdefault(pair.group_id, set()).add(pair.label_a)
    assert sum(labels == {0.5} for labels in by_group.values()) == len(expected["all_tie_prompts"])
    check_records(reader)


def test_imagereward_leaves_out_exactly_the_unreadable_images(sets) -> None:
    root, expected = sets[0] / "imagereward", sets[1]["imagereward"]
    reader = ImageRewardReader(str(root), on_error="skip")
    unreadable = unreadable_rows(reader)
    missing = expected["missing_file"]
    lost = [n for n in range(len(reader)) if missing and str(missing) in f"{reader[n].image_a} {reader[n].image_b}"]
    assert set(lost) <= set(unreadable)
    if "unreadable_groups" not in expected:
        assert lost == unreadable
        return
    groups = Counter(reader[n].group_id for n in unreadable)
    assert groups == dict.fromkeys(expected["unreadable_groups"], 2)  # of three images the second cannot be read


def test_imagerewarddb(sets) -> None:
    root, expected = sets[0] / "imagerewarddb", sets[1]["imagerewarddb"]
    reader = ImageRewardDBReader(str(root), "test", on_error="skip")
    places = [
        (name, place)
        for name, _, both in (one.rpartition(":") for one in reader.pair_ids())
        for place in both.split("-")
    ]
    assert (len({*places}), number_of_groups(reader)) == (expected["rows"], expected["prompts"])
    assert counts(reader)[1] == expected["strict_pairs"]
    check_records(reader)
    unreadable_rows(reader)


def test_imagerewarddb_gives_the_same_from_the_parts_themselves(sets, tmp_path) -> None:
    root = sets[0] / "imagerewarddb"
    reader = ImageRewardDBReader(str(root), "test", on_error="skip")
    images = tmp_path / "zips" / "images"
    images.mkdir(parents=True)
    (images / "test").symlink_to(root / "images" / "test")
    unpacked = tmp_path / "folders" / "images" / "test"
    for archive in (root / "images" / "test").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(unpacked / archive.stem)
    for folder in ("zips", "folders"):
        other = ImageRewardDBReader(str(tmp_path / folder), "test", on_error="skip", allow_outside=True)
        assert (other.pair_ids(), other.prompts()) == (reader.pair_ids(), reader.prompts())
        np.testing.assert_array_equal(other.labels(), reader.labels())
        if not reader.remarks:  # where each path names its part
            assert unreadable_rows(other) == unreadable_rows(reader)


@pytest.mark.parametrize("split", ["test", "test_v1"])
def test_genai_bench_records(sets, split) -> None:
    reader = GenAIBenchReader(str(sets[0] / "genai_bench"), split, on_error="skip")
    check_records(reader)
    unreadable_rows(reader)


def test_genai_bench(sets) -> None:
    root, expected = sets[0] / "genai_bench", sets[1]["genai_bench"]
    reader = GenAIBenchReader(str(root), "test", on_error="skip")
    assert len(reader) + reader.skipped.total() == expected["test_rows"]
    votes = Counter(reader.facts()["vote"])
    for kind in ("leftvote", "rightvote", "tievote", "bothbad_vote"):
        assert votes[kind] == expected["votes"].get(kind, 0)
    assert counts(reader) == (votes["tievote"] + votes["bothbad_vote"], votes["leftvote"] + votes["rightvote"])
    unreadable = unreadable_rows(reader)
    check_rows(unreadable, expected, "undecodable_rows")
    strict = np.flatnonzero(np.isin(reader.labels(), (0, 1)))
    assert len(set(strict) - set(unreadable)) == expected["strict_decodable"]


@pytest.mark.parametrize("memory_map", [False, True])
def test_genai_bench_cmu(sets, memory_map, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    root, expected = sets[0] / "genai_bench_cmu", sets[1]["genai_bench_cmu"]
    reader = GenAIBenchCMUReader(str(root), memory_map=memory_map, on_error="skip")
    assert (number_of_groups(reader), len(reader)) == (expected["rows"], expected["pairs"])
    assert counts(reader) == (expected["ties"], expected["strict"])
    unreadable_rows(reader)
    check_records(reader)
