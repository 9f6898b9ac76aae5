"""Readers of published sets: what a row becomes, odd values, sides, and where images are found."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from latentreward.core.errors import InputError
from latentreward.data import (
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    PairDataset,
    PickAPicReader,
    PixelLoader,
)
from latentreward.data.format_detection import recognise

NAME = "train-00000-of-00001-0123456789abcdef.parquet"


def test_row_becomes_a_record(write_pickapic, pickapic_rows) -> None:
    source = write_pickapic([pickapic_rows(0), pickapic_rows(1, num_example_per_prompt=4, caption=" raw\n\n🦊 نص ")])
    pair = PickAPicReader(source, "train")[1]
    assert pair.pair_id == f"{NAME}:1"
    assert pair.prompt == " raw\n\n🦊 نص "
    assert (pair.label_a, pair.weight) == (1.0, 0.25)
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("image-1-0", "image-1-1")
    assert pair.image_a.data == pickapic_rows(1)["jpg_0"]
    assert (pair.model_a, pair.model_b, pair.source, pair.split) == ("left", "right", "pickapic", "train")


@pytest.mark.parametrize(
    ("changes", "label", "remark"),
    [
        ({"label_0": 1.0, "label_1": 0.0}, 1.0, None),
        ({"label_0": 0.0, "label_1": 1.0}, 0.0, None),
        ({"label_0": 0.5, "label_1": 0.5}, 0.5, None),
        ({"label_0": 0.3, "label_1": 0.7}, 0.3, None),
        ({"label_0": 1.0, "label_1": 1.0}, None, "unlabelled (labels do not add up to 1)"),
        ({"label_0": 0.0, "label_1": 0.0}, None, "unlabelled (labels do not add up to 1)"),
        ({"label_0": None, "label_1": None}, None, "unlabelled (null label)"),
        ({"label_0": None, "label_1": 0.0}, None, "unlabelled (null label)"),
        ({"has_label": False}, None, "unlabelled (has_label is not true)"),
        ({"has_label": None}, None, "unlabelled (has_label is not true)"),
        ({"has_label": False, "label_0": float("nan")}, None, "unlabelled (has_label is not true)"),
    ],
)
def test_labels(write_pickapic, pickapic_rows, changes, label, remark) -> None:
    reader = PickAPicReader(write_pickapic([pickapic_rows(0), pickapic_rows(1, **changes)]), "train")
    assert reader[1].label_a == label
    assert reader.labelled().tolist() == [True, label is not None]
    assert dict(reader.remarks) == ({remark: 1} if remark else {})
    assert not reader.skipped


def test_identical_images_are_dropped_on_demand(write_pickapic, pickapic_rows) -> None:
    rows = [
        pickapic_rows(0),
        pickapic_rows(1, are_different=False),
        pickapic_rows(2, image_0_uid="same", image_1_uid="same"),
        pickapic_rows(3, are_different=None),
    ]
    source = write_pickapic(rows)
    assert len(PickAPicReader(source, "train")) == 4
    reader = PickAPicReader(source, "train", drop_identical=True)
    assert [reader[i].pair_id[-1] for i in range(len(reader))] == ["0", "3"]
    assert dict(reader.skipped) == {"identical images": 2}


def test_odd_values_are_survived(write_pickapic, pickapic_rows) -> None:
    rows = [
        pickapic_rows(0, caption=None, num_example_per_prompt=None),
        pickapic_rows(1, caption="", num_example_per_prompt=0),
        pickapic_rows(2, image_0_uid=None, jpg_1=None),
        pickapic_rows(2),
        pickapic_rows(2),
    ]
    reader = PickAPicReader(write_pickapic(rows), "train")
    assert reader.prompts() == ["", "", "prompt 2", "prompt 2", "prompt 2"]
    assert reader.remarks["null prompt read as empty"] == 1
    assert (reader[0].prompt, reader[0].weight, reader[1].weight) == ("", 1.0, 1.0)
    assert len(reader[2].image_a.image_key) == 32
    assert reader[2].image_b.data is None
    assert reader[3].pair_id != reader[4].pair_id


def test_hub_id_reads_the_files_that_the_builder_lists(write_pickapic, pickapic_rows, monkeypatch, tmp_path) -> None:
    import datasets

    source = write_pickapic([pickapic_rows(n) for n in range(4)], parts=2)
    real = datasets.load_dataset_builder
    asked = []

    def from_folder(path: str, name: str | None, revision: str | None) -> object:
        asked.append((path, name, revision))
        return real(source, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    reader = PickAPicReader("some/hub-id", "train", revision="abc")
    assert asked == [("some/hub-id", None, "abc")]
    assert [reader[i].pair_id for i in (0, 3)] == [
        f"train-0000{n}-of-00002-0123456789abcdef.parquet:{n}" for n in (0, 1)
    ]
    with pytest.raises(InputError, match="no parquet files of 'test' in 'some/hub-id'; it has train"):
        PickAPicReader("some/hub-id", "test")


def test_a_split_is_not_mistaken_for_a_longer_name(write_pickapic, pickapic_rows) -> None:
    write_pickapic([pickapic_rows(0), pickapic_rows(1)], split="validation_unique")
    source = write_pickapic([pickapic_rows(2)], split="validation")
    assert len(PickAPicReader(source, "validation")) == 1


@pytest.mark.parametrize("memory_map", [False, True])
def test_random_access_over_parts_gives_the_row_asked_for(
    write_pickapic, pickapic_rows, memory_map, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [pickapic_rows(n) for n in range(23)]
    reader = PickAPicReader(write_pickapic(rows, parts=4, row_group_size=3), "train", memory_map=memory_map)
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        for n in (22, 0, 6, 5, 17, 11, 12):
            pair = copy[n]
            assert pair.image_a.image_key == f"image-{n}-0"
            assert (pair.image_a.data, pair.image_b.data) == (rows[n]["jpg_0"], rows[n]["jpg_1"])
    assert len({reader[n].pair_id for n in range(23)}) == 23


def test_random_access_reads_single_row_groups(write_pickapic, pickapic_rows) -> None:
    reader = PickAPicReader(write_pickapic([pickapic_rows(n % 20) for n in range(400)], row_group_size=4), "train")
    store = reader.images_in[0]._groups
    assert store.row_groups_read == 0, "construction touches no image"
    reader.prompts(), reader.labelled()
    assert store.row_groups_read == 0
    for row in (399, 7, 200):
        reader[row]
    assert store.row_groups_read == 3
    for row in range(40, 80):
        reader[row]
    assert store.row_groups_read == 3 + 10, "neighbours share a row group"


def test_copy_without_images_is_read_on_demand(write_pickapic, pickapic_rows) -> None:
    rows = [pickapic_rows(0), pickapic_rows(1, image_0_uid=None)]
    source = write_pickapic(rows, drop=("jpg_0", "jpg_1"))
    with pytest.raises(InputError, match=r"copy without images.*set images to none"):
        PickAPicReader(source, "train")
    reader = PickAPicReader(source, "train", images="none")
    assert reader.prompts() == ["prompt 0", "prompt 1"]
    assert reader.labels().tolist() == [0.0, 1.0]
    assert (reader[0].image_a.image_key, reader[1].image_a.image_key) == ("image-0-0", "")
    assert (reader[0].image_a.data, reader[0].image_a.path) == (None, None)
    with pytest.raises(InputError, match="PickAPicReader: its rows hold nothing, not images; give a copy"):
        PairDataset(reader, PixelLoader(8, 8))


def test_row_becomes_a_record_of_hpdv3(write_hpdv3, hpdv3_rows) -> None:
    root = write_hpdv3([hpdv3_rows(0), hpdv3_rows(1, prompt="two\n\nparagraphs")])
    pair = HPDv3Reader(root, "train", randomise_sides=False)[1]
    assert (pair.pair_id, pair.prompt, pair.label_a) == ("train.json:1", "two\n\nparagraphs", 1.0)
    assert (pair.image_a.image_key, pair.image_a.path) == ("images/1-good.jpg", Path(root, "images/1-good.jpg"))
    assert (pair.votes, pair.confidence, pair.model_a, pair.model_b) == ((9, 3), 0.97, "flux", "sdxl")
    assert (pair.source, pair.split, pair.weight) == ("hpdv3", "train", 1.0)


@pytest.mark.parametrize(
    ("changes", "votes", "confidence", "remarks"),
    [
        ({"choice_dist": None, "confidence": None}, None, None, []),
        ({"choice_dist": ..., "confidence": ..., "model1": ..., "model2": ...}, None, None, []),
        ({"choice_dist": "[8, 1]", "confidence": "0.98"}, (8, 1), 0.98, []),
        ({"choice_dist": "null", "confidence": "null"}, None, None, []),
        ({"choice_dist": [0, 0]}, (0, 0), 0.97, []),
        ({"choice_dist": [5, 5.0]}, (5, 5), 0.97, []),
        ({"choice_dist": [7]}, None, 0.97, ["votes not readable"]),
        ({"choice_dist": "__import__('os')"}, None, 0.97, ["votes not readable"]),
        ({"choice_dist": {"a": 1}}, None, 0.97, ["votes not readable"]),
        ({"confidence": "high"}, (9, 3), None, ["confidence not readable"]),
        ({"confidence": float("nan")}, (9, 3), None, ["confidence not readable"]),
    ],
)
def test_votes_and_confidence(write_hpdv3, hpdv3_rows, changes, votes, confidence, remarks) -> None:
    reader = HPDv3Reader(write_hpdv3([hpdv3_rows(0, **changes)]), "train", randomise_sides=False)
    assert (reader[0].votes, reader[0].confidence, reader[0].label_a) == (votes, confidence, 1.0)
    assert list(reader.remarks) == remarks


@pytest.mark.parametrize(
    ("votes", "label"), [([9, 3], 0.75), ([3, 9], 0.25), ([4, 4], 0.5), ([0, 0], 1.0), (None, 1.0), ([0, 7], 0.0)]
)
def test_labels_from_votes(write_hpdv3, hpdv3_rows, votes, label) -> None:
    root = write_hpdv3([hpdv3_rows(0, choice_dist=votes)])
    assert HPDv3Reader(root, "train", label="votes", randomise_sides=False)[0].label_a == label
    assert HPDv3Reader(root, "train", randomise_sides=False)[0].label_a == 1.0


def test_confidence_threshold_keeps_what_has_none(write_hpdv3, hpdv3_rows) -> None:
    values = [0.95, 0.9499, None, ..., "null", "0.98", "0.2", 1, 0]
    root = write_hpdv3([hpdv3_rows(n, confidence=value) for n, value in enumerate(values)])
    reader = HPDv3Reader(root, "train", min_confidence=0.95)
    assert [reader[i].pair_id.split(":")[1] for i in range(len(reader))] == ["0", "2", "3", "4", "5", "7"]
    assert dict(reader.skipped) == {"confidence below the threshold": 3}


def test_hpdv3_plus_is_read_by_the_subfolder_of_its_file(hpdv3_rows, write_hpdv3) -> None:
    """Layout and fields of its card: pairs of three fields, and pairs with votes and confidence as texts."""
    plain = dict.fromkeys(("choice_dist", "confidence", "model1", "model2"), ...)
    root = Path(write_hpdv3([]))
    for split, row in {"train/train_aes": hpdv3_rows(0, **plain), "test/test_tf": hpdv3_rows(1, **plain)}.items():
        (root / split).parent.mkdir()
        (root / f"{split}.json").write_text(json.dumps([row]))
    labelled = hpdv3_rows(2, choice_dist="[8, 1]", confidence="0.98", model1=None, model2=None)
    (root / "train/stage1_labeled.json").write_text(json.dumps([labelled]))
    (root / "train/rollout.json").write_text(json.dumps([{"group_id": "cap_0_sd15_0", "image_path": "images/a.jpg"}]))
    (root / "train.json").unlink()
    found = recognise(str(root))
    assert set(found) == {"stage1_labeled", "train_aes", "test_tf"}
    readers = {name: build(randomise_sides=False) for name, build in found.items()}
    assert readers["test_tf"][0].pair_id == "test_tf.json:0"
    assert readers["train_aes"][0].image_a.path == root / "images/0-good.jpg"
    assert (readers["stage1_labeled"][0].votes, readers["stage1_labeled"][0].confidence) == ((8, 1), 0.98)


@pytest.mark.parametrize("label", ["hard", "votes"])
def test_labels_and_facts_need_no_rows(write_hpdv3, hpdv3_rows, monkeypatch, label) -> None:
    votes = [[9, 3], [0, 0], None, [1, 4]]
    root = write_hpdv3([hpdv3_rows(n, choice_dist=value) for n, value in enumerate(votes)], images=False)
    reader = HPDv3Reader(root, "train", label=label)
    pairs = [reader[n] for n in range(4)]
    monkeypatch.setattr(HPDv3Reader, "read_row", None)
    assert reader.labels().tolist() == [pair.label_a for pair in pairs]
    assert reader.facts()["votes_a"] == [pair.votes and pair.votes[0] for pair in pairs]


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


ITEM = {"id": "005658-0040", "prompt": "a prompt", "generations": ["p/a.webp", "p/b.webp", "c.webp"]}
ITEM = {**ITEM, "ranking": [2, 1, 2]}


@pytest.fixture
def write_items(tmp_path, jpeg):
    def write(rows: Any) -> str:
        for name in ("p/a", "p/b", "c"):
            file = tmp_path / "data" / "test_images" / f"{name}.webp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(fmt="WEBP"))
        (tmp_path / "data" / "test.json").write_text(json.dumps(rows))
        return str(tmp_path)

    return write


def db_row(prompt: int, rank: int | None, part: int = 1, **changes: Any) -> dict[str, Any]:
    path = f"images/train/train_{part}/{prompt}-{rank}.webp"
    return {"image_path": path, "prompt_id": f"{prompt:06d}", "prompt": f"prompt {prompt}", "rank": rank, **changes}


@pytest.fixture
def write_db(tmp_path, jpeg):
    """Write rows into their parts; returns the root."""

    def write(rows: list[dict[str, Any]]) -> str:
        folder = tmp_path / "images" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            parts.setdefault(row["image_path"].split("/")[2], []).append(row)
        for part, members in parts.items():
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                for row in members:
                    name = Path(row["image_path"]).name
                    if name not in archive.namelist():
                        archive.writestr(name, jpeg((17 * len(name), 5, 9), size=(300, 200), fmt="PNG"))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
        return str(tmp_path)

    return write


@pytest.mark.parametrize("folder", ["", "data"])
def test_item_gives_all_pairs(write_items, folder) -> None:
    reader = ImageRewardReader(str(Path(write_items([ITEM]), folder)), randomise_sides=False)
    assert reader.pair_ids() == ["test.json:0:0-1", "test.json:0:0-2", "test.json:0:1-2"]
    assert reader.labels().tolist() == [0, 0.5, 1]
    pair = reader[0]
    assert (pair.group_id, pair.prompt, pair.source, pair.split) == ("005658-0040", "a prompt", "imagereward", "test")
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("p/a.webp", "p/b.webp")
    PairDataset(reader, PixelLoader(8, 8))[0]


def test_rows_of_a_prompt_give_all_pairs(write_db) -> None:
    rows = [db_row(7, rank) for rank in (1, 3)] + [db_row(2, 1, part=2), db_row(2, 2, part=2), db_row(7, 2)]
    reader = ImageRewardDBReader(write_db(rows), "train", randomise_sides=False)
    pairs = ["000007:0-1", "000007:0-2", "000007:1-2"]
    assert sorted(reader.pair_ids()) == ["000002:0-1", *pairs]
    by_name = {pair.pair_id: pair for pair in reader}
    assert [by_name[name].label_a for name in pairs] == [1, 1, 0]
    pair = by_name["000002:0-1"]
    assert (pair.group_id, pair.prompt, pair.source, pair.split) == ("000002", "prompt 2", "imagerewarddb", "train")
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("2-1.webp", "2-2.webp")
    assert pair.image_a.data.startswith(b"\x89PNG")


def test_parts_can_be_chosen(write_db) -> None:
    root = write_db([db_row(n, rank, part=n) for n in (1, 2, 3) for rank in (1, 2)])
    assert ImageRewardDBReader(root, "train", parts=[3, 1]).pair_ids() == ["000001:0-1", "000003:0-1"]
    with pytest.raises(InputError, match=r"parts: no train_9\.zip in .*images/train; download it, or leave it out"):
        ImageRewardDBReader(root, "train", parts=[1, 9])
    with pytest.raises(InputError, match=r"split: no test_\*\.zip in .*; set source"):
        ImageRewardDBReader(root, "test")


def test_missing_part_follows_on_error(write_db) -> None:
    root = write_db([db_row(n, rank, part=n) for n in (1, 2) for rank in (1, 2)])
    Path(root, "images/train/train_2.zip").unlink()
    with pytest.raises(InputError, match=r"metadata-train\.parquet: train lacks 1 of its parts \(train_2\)"):
        ImageRewardDBReader(root, "train")
    reader = ImageRewardDBReader(root, "train", on_error="skip")
    assert (reader.pair_ids(), dict(reader.skipped)) == (["000001:0-1"], {"part missing": 1})
    assert len(ImageRewardDBReader(root, "train", parts=[1])) == 1


def test_unpacked_part_is_read_instead_of_its_zip_file(write_db) -> None:
    root = write_db([db_row(1, rank) for rank in (1, 2)])
    archive = Path(root, "images/train/train_1.zip")
    zipfile.ZipFile(archive).extractall(archive.with_suffix(""))
    archive.write_bytes(b"broken")
    image = ImageRewardDBReader(root, "train", randomise_sides=False)[0].image_a
    assert (image.path, image.root) == (archive.with_suffix("") / "1-1.webp", archive.with_suffix(""))
    assert image.image_key == "1-1.webp"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": None}, r"000001: rank is \[1, None\], not one number for each of 2 images"),
        ({"prompt_id": None}, r"metadata-train\.parquet:1: prompt_id is null or missing"),
    ],
)
def test_rows_that_break_a_rule_are_named(write_db, changes, problem) -> None:
    root = write_db([db_row(1, 1), {**db_row(1, 2), **changes}, db_row(2, 1), db_row(2, 2)])
    with pytest.raises(InputError, match=f"{problem}.*; correct the row, or set the reader's on_error"):
        ImageRewardDBReader(root, "train")
    reader = ImageRewardDBReader(root, "train", on_error="skip")
    assert reader.pair_ids() == ["000002:0-1"]
    assert reader.skipped.total() == 1


def test_damage_is_named(write_db) -> None:
    root = write_db([db_row(1, rank) for rank in (1, 2)])
    archive = Path(root, "images/train/train_1.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    with pytest.raises(InputError, match=r"train_1\.zip: not a whole zip file .*; download it again"):
        ImageRewardDBReader(root, "train")


def test_damaged_and_absent_members_are_images_that_cannot_be_read(write_db) -> None:
    rows = [db_row(1, 1), db_row(1, 2), db_row(1, 3), {**db_row(1, 4), "image_path": "images/train/train_1/1-1.webp"}]
    root = write_db(rows)
    archive = Path(root, "images/train/train_1.zip")
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo("1-2.webp")
        content = {name: opened.read(name) for name in opened.namelist() if name != "1-3.webp"}
    with zipfile.ZipFile(archive, "w") as rewritten:
        for name, data in content.items():
            rewritten.writestr(name, data)
        info = rewritten.getinfo("1-2.webp")
    damaged = bytearray(archive.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    damaged[start + 60 : start + info.file_size] = bytes(info.file_size - 60)
    archive.write_bytes(damaged)
    dataset = PairDataset(ImageRewardDBReader(root, "train", on_error="skip"), PixelLoader(8, 8))
    kinds = {dataset.reader[n].pair_id[-3:]: type(dataset[n]).__name__ for n in range(6)}
    assert {places for places, kind in kinds.items() if kind == "LoadedPair"} == {"0-3"}
    assert set(dataset.skipped()) == {"truncated or damaged image", "missing file"}


def test_workers_open_the_zip_files_themselves(write_db) -> None:
    root = write_db([db_row(n, rank, part=1 + n % 2) for n in range(20) for rank in (1, 2)])
    reader = ImageRewardDBReader(root, "train")
    expected = [reader[n] for n in range(len(reader))]
    assert len(pickle.dumps(reader)) < 10_000
    loader = DataLoader(reader, batch_size=None, num_workers=2, multiprocessing_context="fork")  # open files and all
    assert list(loader) == expected
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy[n] for n in range(len(copy))] == expected


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
VOTES = ("leftvote", "rightvote", "tievote", "bothbad_vote", "elsewhere", None)
MODELS = ("A", "B", "C")


@pytest.fixture
def write_votes(tmp_path, jpeg):
    """Write one row for each vote; returns the root."""

    def write(votes=VOTES, columns=(), split="test", parts=1, **changes: Any) -> str:
        rows = [
            {
                "prompt": f"prompt {n}",
                "left_model": "LCM",
                "left_image": {"bytes": jpeg((40 * n, 3, 3)), "path": "x.jpg"},
                "right_model": "SDXL",
                "right_image": {"bytes": jpeg((3, 40 * n, 3)), "path": None},
                "vote_type": vote,
                **changes,
            }
            for n, vote in enumerate(votes)
        ]
        texts = {name: pa.string() for name in ("prompt", "left_model", "right_model", "vote_type")}
        schema = pa.schema({**texts, "left_image": IMAGE, "right_image": IMAGE})
        folder = tmp_path / "image_generation"
        folder.mkdir(exist_ok=True)
        for part in range(parts):
            table = pa.Table.from_pylist(rows[part::parts], schema=schema)
            file = folder / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            pq.write_table(table.select(columns) if columns else table, file, row_group_size=2)
        return str(tmp_path)

    return write


@pytest.fixture
def write_ratings(tmp_path, jpeg):
    """Write rows of ratings by model; returns the root."""

    def write(ratings: list[dict[str, Any] | None]) -> str:
        images = {model: {"bytes": jpeg((60 * n, 3, 3)), "path": None} for n, model in enumerate(MODELS)}
        rows = [{**images, "Index": n, "Prompt": "p", "HumanRatings": given} for n, given in enumerate(ratings)]
        rated = pa.struct(dict.fromkeys(MODELS, pa.list_(pa.int64())))
        named = {"Index": pa.int64(), "Prompt": pa.string(), "HumanRatings": rated}
        file = tmp_path / "data" / "train-00000-of-00001.parquet"
        file.parent.mkdir()
        schema = pa.schema({**named, **dict.fromkeys(MODELS, IMAGE)})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=2)
        return str(tmp_path)

    return write


def test_votes_become_labels(write_votes) -> None:
    reader = GenAIBenchReader(write_votes())
    assert [pair.label_a for pair in reader] == [1, 0, 0.5, 0.5, None, None]
    assert reader.facts()["vote"] == list(VOTES)
    assert dict(reader.remarks) == {"unlabelled (vote_type is none of leftvote, rightvote, tievote, bothbad_vote)": 2}


def test_splits_are_told_apart_and_parts_are_counted(write_votes) -> None:
    root = write_votes(parts=3)
    write_votes(votes=VOTES[:2], split="test_v1")
    assert (len(GenAIBenchReader(root)), len(GenAIBenchReader(root, "test_v1"))) == (6, 2)
    assert GenAIBenchReader(root)[2].prompt == "prompt 1"  # first row of the second part
    Path(root, "image_generation/test-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"test lacks 1 of its parquet parts \(00001-of-00003\)"):
        GenAIBenchReader(root)
    reader = GenAIBenchReader(root, on_error="skip")
    assert (len(reader), dict(reader.skipped)["parquet part missing"]) == (4, 1)


def test_ratings_become_labels(write_ratings) -> None:
    ratings = [{"A": [5, 5, 5], "B": [1, 2, 3], "C": [2, 2, 2]}, {"A": [4], "B": [5, 3, None], "C": None}]
    reader = GenAIBenchCMUReader(write_ratings(ratings), randomise_sides=False)
    np.testing.assert_array_equal(reader.labels(), [1, 1, 0.5, 0.5, np.nan, np.nan])
    pair = reader[4]
    assert (pair.pair_id, pair.group_id) == ("train-00000-of-00001.parquet:1:0-2", "1")
    assert (pair.model_a, pair.model_b, pair.source) == ("A", "C", "genai_bench_cmu")
    assert [reader[n].image_b.image_key for n in (1, 2)] == [pair.image_b.image_key] * 2  # content, not row
    assert dict(reader.remarks) == {"image without ratings": 1}
