import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from latentreward.core.errors import InputError
from latentreward.data import ImageRewardDBReader, ImageRewardReader, PairDataset, PixelLoader

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

    def write(rows: list[dict[str, Any]], metadata: bool = True) -> str:
        folder = tmp_path / "images" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            parts.setdefault(row["image_path"].split("/")[2], []).append(row)
        for part, members in parts.items():
            with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                archive.writestr(f"{part}.json", json.dumps(members))
                for row in members:
                    name = Path(row["image_path"]).name
                    if name not in archive.namelist():
                        archive.writestr(name, jpeg((17 * len(name), 5, 9), size=(300, 200), fmt="PNG"))
        if metadata:
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


def test_sides_are_randomised_by_name_and_seed(write_items) -> None:
    root = write_items([{**ITEM, "ranking": [1, 2, 3]}] * 60)
    plain, reader = ImageRewardReader(root, randomise_sides=False), ImageRewardReader(root)
    assert set(plain.labels()) == {1}
    assert 60 < reader.labels().sum() < 120
    for n in range(len(reader)):
        assert reader[n] in (plain[n], plain[n].swapped())
        assert reader[n].label_a == reader.labels()[n]
    assert ImageRewardReader(root, seed=1).labels().tolist() != reader.labels().tolist()


@pytest.mark.parametrize("metadata", [True, False])
def test_rows_of_a_prompt_give_all_pairs(write_db, metadata) -> None:
    rows = [db_row(7, rank) for rank in (1, 3)] + [db_row(2, 1, part=2), db_row(2, 2, part=2), db_row(7, 2)]
    reader = ImageRewardDBReader(write_db(rows, metadata), "train", randomise_sides=False)
    pairs = ["000007:0-1", "000007:0-2", "000007:1-2"]
    assert sorted(reader.pair_ids()) == ["000002:0-1", *pairs]
    by_name = {pair.pair_id: pair for pair in reader}
    assert [by_name[name].label_a for name in pairs] == [1, 1, 0]
    pair = by_name["000002:0-1"]
    assert (pair.group_id, pair.prompt, pair.source, pair.split) == ("000002", "prompt 2", "imagerewarddb", "train")
    assert (pair.image_a.image_key, pair.image_b.image_key) == ("2-1.webp", "2-2.webp")
    assert pair.image_a.data.startswith(b"\x89PNG")


def test_an_id_with_a_lone_surrogate_names_a_prompt(write_db) -> None:
    root = write_db([db_row(1, rank, prompt_id="\ud800x") for rank in (1, 2)], metadata=False)
    assert ImageRewardDBReader(root, "train").pair_ids() == ["?x:0-1"]


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
    root = write_db([db_row(1, rank) for rank in (1, 2)], metadata=False)
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
    root = write_db([db_row(1, rank) for rank in (1, 2)], metadata=False)
    archive = Path(root, "images/train/train_1.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    with pytest.raises(InputError, match=r"train_1\.zip: not a whole zip file .*; download it again"):
        ImageRewardDBReader(root, "train")
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("other.json", "[]")
    with pytest.raises(InputError, match=r"train_1\.zip: no readable train_1\.json in it"):
        ImageRewardDBReader(root, "train")


def test_damaged_and_absent_members_are_images_that_cannot_be_read(write_db) -> None:
    rows = [db_row(1, 1), db_row(1, 2), db_row(1, 3), {**db_row(1, 4), "image_path": "images/train/train_1/1-1.webp"}]
    root = write_db(rows, metadata=False)
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


def test_hub_id_downloads_the_parts(write_db, tmp_path, monkeypatch) -> None:
    root = Path(write_db([db_row(n, rank, part=n) for n in (1, 2) for rank in (1, 2)]))
    monkeypatch.setattr("latentreward.data.readers.tables.LOCATION", f"{root}/{{}}/{{}}")
    (root / "some" / "hub-id").mkdir(parents=True)
    (root / "some" / "hub-id" / "abc").symlink_to(root)
    reader = ImageRewardDBReader("some/hub-id", "train", parts=[2], revision="abc")
    assert reader.pair_ids() == ["000002:0-1"]
    with pytest.raises(InputError, match=r"the hub does not give images/train/train_1\.zip of it"):
        ImageRewardDBReader("some/hub-id", "train")
    with pytest.raises(InputError, match="split: no 'val' in some/hub-id; choose from train, validation, test"):
        ImageRewardDBReader("some/hub-id", "val")
