"""Pairs as files: layouts, determinism, splits, and the side files."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentreward.tinyworld import TinyWorldDataModule, writers
from latentreward.tinyworld.pairs import Pair
from latentreward.tinyworld.writers import PICKAPIC_SCHEMA, write_generated, write_hpdv3, write_pickapic
from tests.marks import slow_after

PICKAPIC_PAIRS = {"train": 300, "validation": 40, "test": 40, "validation_unique": 30, "test_unique": 30}


@pytest.fixture(scope="module")
def pickapic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickapic(tmp_path_factory.mktemp("tinyworld") / "pickapic", PICKAPIC_PAIRS, seed=1)


@pytest.fixture(scope="module")
def hpdv3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpdv3(tmp_path_factory.mktemp("tinyworld") / "hpdv3", {"train": 200, "test": 30}, seed=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pickapic_layout(pickapic: Path) -> None:
    for split, number in PICKAPIC_PAIRS.items():
        (path,) = pickapic.glob(f"data/{split}-0*.parquet")
        assert re.fullmatch(rf"{split}-00000-of-00001-[0-9a-f]{{16}}\.parquet", path.name)
        table = pq.read_table(path)
        assert table.schema.equals(PICKAPIC_SCHEMA)
        assert table.num_rows == number
        captions = table["caption"].to_pylist()
        assert table["num_example_per_prompt"].to_pylist() == [captions.count(caption) for caption in captions]
        if split.endswith("_unique"):
            assert len(set(captions)) == number


def test_pickapic_rows_hold_together(pickapic: Path) -> None:
    (path,) = pickapic.glob("data/train-0*.parquet")
    for row in pq.read_table(path).to_pylist():
        assert row["label_0"] + row["label_1"] == 1.0
        expected = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == expected
        assert Image.open(io.BytesIO(row["jpg_0"])).size == (32, 32)


def test_oracle_names_every_pair_of_pickapic(pickapic: Path) -> None:
    oracle = pq.read_table(pickapic / "oracle.parquet").to_pylist()
    assert len(oracle) == sum(PICKAPIC_PAIRS.values())
    utilities = {row["pair_id"]: row["utility_a"] - row["utility_b"] for row in oracle}
    (path,) = pickapic.glob("data/train-0*.parquet")
    labels = pq.read_table(path)["label_0"].to_pylist()
    agreements = []
    for row, label in enumerate(labels):
        gap = utilities[f"{path.name}:{row}"]
        assert (label == 0.5) == (abs(gap) < 0.15)
        agreements.append(label == 0.5 or (gap > 0) == (label == 1.0))
    assert np.mean(agreements) > 0.8


@pytest.mark.slow
def test_the_same_request_gives_the_same_bytes(pickapic: Path, hpdv3: Path, tmp_path: Path) -> None:
    assert contents(write_pickapic(tmp_path / "pickapic", PICKAPIC_PAIRS, seed=1)) == contents(pickapic)
    assert contents(write_hpdv3(tmp_path / "hpdv3", {"train": 200, "test": 30}, seed=1)) == contents(hpdv3)
    assert contents(write_hpdv3(tmp_path / "other", {"train": 200, "test": 30}, seed=2)) != contents(hpdv3)


@pytest.mark.parametrize("layout", slow_after(2, ["pickapic", "hpdv3", "edits"]))
def test_other_training_pairs_have_the_same_held_out_pairs(layout: Any, tmp_path: Path) -> None:
    def pairs(data_seed: int, **seeds: int) -> list[dict[str, Any]]:
        root = tmp_path / f"{data_seed}{seeds}"
        TinyWorldDataModule(str(root), layout, 20, 10, data_seed, **seeds)
        return pq.read_table(root / "oracle.parquet").to_pylist()

    def of(split: bool, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if row["pair_id"].startswith("train") == split]

    first, other = pairs(0), pairs(1, val_seed=0)
    assert of(False, other) == of(False, first)
    assert of(True, other) == of(True, pairs(1))
    assert [row["utility_a"] for row in of(True, other)] != [row["utility_a"] for row in of(True, first)]
    assert of(False, pairs(1)) != of(False, first)
    TinyWorldDataModule(str(tmp_path / "0{}"), layout, 20, 10, 0, val_seed=0)  # equal seeds are those of one


def test_another_request_for_the_same_folder_is_refused(tmp_path: Path) -> None:
    root = write_pickapic(tmp_path / "pairs", {"train": 4}, seed=0)
    with pytest.raises(ValueError, match="delete it or choose another folder"):
        write_pickapic(root, {"train": 4}, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds other files"):
        write_hpdv3(tmp_path / "mine", {"train": 4})


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> list[Pair]:
        raise RuntimeError("disk full")

    monkeypatch.setattr(writers, "draw_pairs", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_pickapic(tmp_path / "pairs", {"train": 4})
    assert not list(tmp_path.iterdir())


def test_hpdv3_layout(hpdv3: Path) -> None:
    train, test = (json.loads((hpdv3 / f"{split}.json").read_text()) for split in ("train", "test"))
    assert (len(train), len(test)) == (200, 30)
    keys = ["prompt", "choice_dist", "confidence", "path1", "path2", "model1", "model2"]
    assert all(list(row) == keys for row in train)
    assert all(list(row) == [key for key in keys if key not in ("choice_dist", "confidence")] for row in test)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    voted = [row for row in train if row["choice_dist"]]
    assert 0 < len(voted) < len(train)
    assert all(row["choice_dist"][0] > row["choice_dist"][1] and 0.5 <= row["confidence"] <= 1.0 for row in voted)
    assert Image.open(hpdv3 / train[0]["path1"]).size == (32, 32)


def test_hpdv3_prefers_the_first_picture(hpdv3: Path) -> None:
    oracle = pq.read_table(hpdv3 / "oracle.parquet").to_pylist()
    assert oracle[0]["pair_id"] == "train.json:0"
    assert oracle[200]["pair_id"] == "test.json:0"
    gaps = np.array([row["utility_a"] - row["utility_b"] for row in oracle])
    assert np.abs(gaps).min() >= 0.15
    assert (gaps > 0).mean() > 0.8


@pytest.mark.slow
def test_generated_pairs_are_far_apart(tmp_path: Path) -> None:
    root = write_generated(tmp_path / "generated", pairs=40, seed=0, num_inference_steps=4)
    (path,) = root.glob("data/test-0*.parquet")
    table = pq.read_table(path)
    assert set(table["model_0"].to_pylist() + table["model_1"].to_pylist()) == {"sd_tiny", "sd35_tiny"}
    assert set(table["label_0"].to_pylist()) == {0.0, 1.0}
    for row, label in zip(
        pq.read_table(root / "oracle.parquet").to_pylist(), table["label_0"].to_pylist(), strict=True
    ):
        assert abs(row["utility_a"] - row["utility_b"]) > 0.3
        assert (row["utility_a"] > row["utility_b"]) == (label == 1.0)
