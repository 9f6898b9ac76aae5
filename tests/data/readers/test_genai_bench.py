import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.errors import InputError
from latentreward.data import GenAIBenchCMUReader, GenAIBenchReader, PairDataset, PixelLoader

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

    def write(ratings: list[dict[str, Any] | None], older: bool = False) -> str:
        images = {model: {"bytes": jpeg((60 * n, 3, 3)), "path": None} for n, model in enumerate(MODELS)}
        kinds = dict.fromkeys(MODELS, IMAGE)
        if older:
            names = {model: f"{model}_HumanRating" for model in MODELS}
            rows = [{**images, "id": f"{n:05d}", "prompt": "p"} for n in range(len(ratings))]
            rows = [{**r, **{names[m]: str(given[m]) for m in MODELS}} for r, given in zip(rows, ratings, strict=True)]
            schema = pa.schema({"id": pa.string(), "prompt": pa.string(), **kinds})
            schema = pa.schema([*schema, *(pa.field(name, pa.string()) for name in names.values())])
            file = tmp_path / "GenAI-Bench.parquet"
        else:
            rows = [{**images, "Index": n, "Prompt": "p", "HumanRatings": given} for n, given in enumerate(ratings)]
            rated = pa.struct(dict.fromkeys(MODELS, pa.list_(pa.int64())))
            schema = pa.schema({"Index": pa.int64(), "Prompt": pa.string(), "HumanRatings": rated, **kinds})
            file = tmp_path / "data" / "train-00000-of-00001.parquet"
            file.parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=2)
        return str(tmp_path)

    return write


def test_votes_become_labels(write_votes) -> None:
    reader = GenAIBenchReader(write_votes())
    assert [pair.label_a for pair in reader] == [1, 0, 0.5, 0.5, None, None]
    assert reader.facts()["vote"] == list(VOTES)
    assert dict(reader.remarks) == {
        "unlabelled (vote_type is none of leftvote, rightvote, tievote, bothbad_vote)": 2,
    }
    reader = GenAIBenchReader(write_votes(), both_bad="unlabelled")
    assert [pair.label_a for pair in reader] == [1, 0, 0.5, None, None, None]


def test_row_becomes_a_record(write_votes, jpeg) -> None:
    root = write_votes(columns=["right_image", "vote_type", "left_model", "prompt", "left_image", "right_model"])
    reader = GenAIBenchReader(f"{root}/image_generation")
    pair = pickle.loads(pickle.dumps(reader))[3]
    assert (pair.pair_id, pair.prompt) == ("test-00000-of-00001.parquet:3", "prompt 3")
    assert (pair.model_a, pair.model_b) == ("LCM", "SDXL")
    assert (pair.image_a.data, pair.image_b.data) == (jpeg((120, 3, 3)), jpeg((3, 120, 3)))
    assert (pair.source, pair.split) == ("genai_bench_tiger", "test")
    assert len(pair.image_a.image_key) == 32
    assert pair.image_a.image_key != pair.image_b.image_key


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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "left_model", "right_model", "left_image", "right_image"], "no column vote_type"),
        (["prompt", "left_model", "right_model", "vote_type", "left_image"], "no column right_image"),
    ],
)
def test_missing_columns_are_named(write_votes, columns, message) -> None:
    with pytest.raises(InputError, match=f"{message}; give the published files"):
        GenAIBenchReader(write_votes(columns=columns))


def test_columns_of_another_type_are_named(tmp_path, write_votes) -> None:
    root = write_votes()
    file = Path(root, "image_generation/test-00000-of-00001.parquet")
    table = pq.read_table(file)
    numbers = pa.array(range(len(table)))
    pq.write_table(table.set_column(table.column_names.index("left_image"), "left_image", numbers), file)
    with pytest.raises(InputError, match="column left_image is int64, not images"):
        GenAIBenchReader(root)


def test_ratings_become_labels(write_ratings) -> None:
    ratings = [{"A": [5, 5, 5], "B": [1, 2, 3], "C": [2, 2, 2]}, {"A": [4], "B": [5, 3, None], "C": None}]
    reader = GenAIBenchCMUReader(write_ratings(ratings), randomise_sides=False)
    np.testing.assert_array_equal(reader.labels(), [1, 1, 0.5, 0.5, np.nan, np.nan])
    pair = reader[4]
    assert (pair.pair_id, pair.group_id) == ("train-00000-of-00001.parquet:1:0-2", "1")
    assert (pair.model_a, pair.model_b, pair.source) == ("A", "C", "genai_bench_cmu")
    assert [reader[n].image_b.image_key for n in (1, 2)] == [pair.image_b.image_key] * 2  # content, not row
    assert dict(reader.remarks) == {"image without ratings": 1}


@pytest.mark.parametrize("memory_map", [False, True])
def test_pairs_keep_their_models_when_sides_change(write_ratings, memory_map, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_ratings([{"A": [5], "B": [3], "C": [1]}] * 20)
    plain = GenAIBenchCMUReader(root, randomise_sides=False)
    reader = GenAIBenchCMUReader(root, memory_map=memory_map)
    assert 20 < reader.labels().sum() < 40
    for n in range(len(reader)):
        assert reader[n] in (plain[n], plain[n].swapped())


def test_older_revision_is_read_as_well(write_ratings) -> None:
    ratings = [{"A": [5, 5, 5], "B": [1, 2, 3], "C": [2, 2, 2]}, {"A": [1, 1, 1], "B": None, "C": [2]}]
    ratings[1]["B"] = []
    reader = GenAIBenchCMUReader(write_ratings(ratings, older=True), randomise_sides=False)
    np.testing.assert_array_equal(reader.labels(), [1, 1, 0.5, np.nan, 0, np.nan])
    assert (reader[0].pair_id, reader[0].group_id) == ("GenAI-Bench.parquet:0:0-1", "00000")


def test_rows_in_order_decode_each_row_group_once(write_ratings) -> None:
    reader = GenAIBenchCMUReader(write_ratings([{"A": [5], "B": [3], "C": [1]}] * 6))
    assert reader.images_in[0]._groups.row_groups_read == 0
    dataset = PairDataset(reader, PixelLoader(8, 8))
    for n in range(len(dataset)):
        dataset[n]
    assert reader.images_in[0]._groups.row_groups_read == 3
