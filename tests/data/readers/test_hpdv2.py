import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from latentreward.core.errors import InputError
from latentreward.data import HPDv2Reader, PairDataset, PixelLoader

PAIR = {"human_preference": [0, 1], "prompt": "two\n\nparagraphs", "file_path": ["a.jpg", "b.jpg"]}
GROUP = {
    "prompt": "a prompt",
    "image_path": ["a.jpg", "b.jpg", "c.jpg"],
    "rank": [2, 1, 3],
    "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "x"}, {"rank": [1, 2, 2], "user_hash": "y"}],
}


@pytest.fixture
def write(tmp_path, jpeg):
    """Write rows as a split with images a, b and c; returns the root."""

    def write(rows: Any, split: str = "train") -> str:
        (tmp_path / split).mkdir(exist_ok=True)
        for number, name in enumerate("abc"):
            (tmp_path / split / f"{name}.jpg").write_bytes(jpeg((80 * number, 10, 90)))
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        return str(tmp_path)

    return write


def test_row_of_the_training_set(write) -> None:
    root = write([PAIR, PAIR])
    pair = HPDv2Reader(root, "train")[1]
    assert (pair.pair_id, pair.prompt, pair.label_a) == ("train.json:1", "two\n\nparagraphs", 0.0)
    assert (pair.image_a.image_key, pair.image_a.path) == ("train/a.jpg", Path(root, "train/a.jpg"))
    assert pair.image_a.root == Path(root, "train")
    assert (pair.source, pair.split, pair.group_id, pair.votes) == ("hpdv2", "train", None, None)


def test_group_of_the_test_set_gives_all_pairs(write) -> None:
    reader = HPDv2Reader(write([GROUP, {**GROUP, "rank": [1, 1, 2]}], "test"), "test")
    assert reader.pair_ids() == [f"test.json:{row}:{places}" for row in (0, 1) for places in ("0-1", "0-2", "1-2")]
    assert reader.labels().tolist() == [0, 1, 1, 0.5, 1, 1]
    assert [pair.group_id for pair in reader] == ["test.json:0"] * 3 + ["test.json:1"] * 3
    assert [pair.votes for pair in reader][:3] == [(1, 1), (2, 0), (1, 0)]  # who ranks both equally has no vote
    assert (reader[2].image_a.image_key, reader[2].image_b.image_key) == ("test/b.jpg", "test/c.jpg")


@pytest.mark.parametrize(
    ("choice", "label", "remark"),
    [
        ([1, 0], 1.0, None),
        ([0.0, 1.0], 0.0, None),
        (["1", "0"], 1.0, None),
        ([0.5, 0.5], 0.5, None),
        ([1, 1], None, "unlabelled (human_preference is neither a choice nor a tie)"),
        ([0, 0], None, "unlabelled (human_preference is neither a choice nor a tie)"),
        (None, None, "unlabelled (no human_preference)"),
        ([None, None], None, "unlabelled (no human_preference)"),
    ],
)
def test_choices(write, choice, label, remark) -> None:
    reader = HPDv2Reader(write([{**PAIR, "human_preference": choice}]), "train")
    assert reader[0].label_a == label
    assert dict(reader.remarks) == ({remark: 1} if remark else {})


def test_a_split_of_ones_own_names_its_images(write) -> None:
    root = write([PAIR])
    Path(root, "held_out.json").write_text(json.dumps([PAIR]))
    pair = HPDv2Reader(root, "held_out", images=f"{root}/train")[0]
    assert (pair.pair_id, pair.image_a.image_key) == ("held_out.json:0", "train/a.jpg")
    assert pair.image_a.path == Path(root, "train/a.jpg")


def test_nothing_to_read_is_one_clear_line(write) -> None:
    root = write([])
    with pytest.raises(InputError, match="no pairs left"):
        HPDv2Reader(root, "train")
    with pytest.raises(InputError, match=r"no file .*absent\.json"):
        HPDv2Reader(root, "absent")


def test_hub_id_downloads_and_unpacks(write, tmp_path, monkeypatch) -> None:
    root = Path(write([PAIR]))
    with tarfile.open(root / "train.tar.gz", "w:gz") as archive:
        archive.add(root / "train", "train")
    monkeypatch.setattr("latentreward.data.readers.tables.LOCATION", f"{root}/{{}}/{{}}")
    repository = root / "some" / "hub-id" / "abc"
    repository.mkdir(parents=True)
    for name in ("train.json", "train.tar.gz"):
        (root / name).rename(repository / name)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")
    reader = HPDv2Reader("some/hub-id", "train", revision="abc")
    assert reader[0].image_a.image_key == "train/a.jpg"
    assert reader[0].image_a.path.is_relative_to(tmp_path / "cache")
    PairDataset(reader, PixelLoader(8, 8))[0]
    with pytest.raises(
        InputError, match=r"no folder 'some/hub-id', and the hub does not give test\.json of it"
    ) as error:
        HPDv2Reader("some/hub-id", "test", revision="abc")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_large_files_keep_a_compact_index(tmp_path) -> None:
    rows = [{**PAIR, "prompt": f"a prompt of usual length, number {n}, with some words more"} for n in range(20_000)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    del rows
    HPDv2Reader(str(tmp_path), "train")  # imports what it needs, which would count
    tracemalloc.start()
    reader = HPDv2Reader(str(tmp_path), "train")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / len(reader) < 100  # bytes outside of Arrow's pool
    assert len(pickle.dumps(reader)) / len(reader) < 250
