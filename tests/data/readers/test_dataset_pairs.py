"""Pairs in tables of one's own: objects and folders of `datasets`, plain parquet, columns of other names."""

import pickle
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, disable_progress_bars

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import DatasetPairReader, ImageError, PairDataset, PairStream, PixelLoader
from tests.data.edit_names import named

disable_progress_bars()
FEATURES = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "confidence": Value("float32")})
LOADER = PixelLoader(8, 8)


@pytest.fixture
def rows(jpeg) -> dict[str, list[Any]]:
    """Five pairs, each with a prompt and two JPEGs of its own."""
    images = {side: [jpeg((40 * n, red, 9)) for n in range(5)] for side, red in (("chosen", 200), ("rejected", 10))}
    return {"prompt": [f"prompt {n}" for n in range(5)], **images, "confidence": [0.5, 1.0, None, float("nan"), 2.0]}


@pytest.fixture
def dataset(rows) -> Dataset:
    images = {side: [{"bytes": data, "path": None} for data in rows[side]] for side in ("chosen", "rejected")}
    return Dataset.from_dict({**rows, **images}, FEATURES)


def contents(reader: DatasetPairReader) -> list[tuple[str, bytes, bytes, float | None]]:
    pairs = (reader[n] for n in range(len(reader)))
    return [(pair.prompt, pair.image_a.data, pair.image_b.data, pair.label_a) for pair in pairs]


def test_every_source_gives_the_same_rows(dataset, rows, tmp_path) -> None:
    (tmp_path / "plain" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "plain" / "train.parquet")
    dataset.to_parquet(tmp_path / "plain" / "data" / "val-00000-of-00001.parquet")
    places = [dataset, DatasetDict(train=dataset), dataset.with_format("numpy")]
    places += [str(tmp_path / name) for name in ("plain", "plain/train.parquet")]
    expected = [*zip(rows["prompt"], rows["chosen"], rows["rejected"], [1.0] * 5, strict=True)]
    for place in places:
        reader = DatasetPairReader(place, randomise_sides=False)
        assert contents(reader) == expected
        assert contents(pickle.loads(pickle.dumps(reader))) == expected
        assert reader.facts()["confidence"] == [0.5, 1.0, None, None, None]
        assert reader.remarks["confidence not readable"] == 2
        assert PairDataset(reader, LOADER)[4].pixels_a.shape == (3, 8, 8)
    assert DatasetPairReader(dataset).pair_ids()[4] == "train:4"
    assert DatasetPairReader(str(tmp_path / "plain")).pair_ids()[4] == "train.parquet:4"
    assert len(DatasetPairReader(str(tmp_path / "plain"), "val")) == 5


def test_a_pattern_of_files_is_their_rows_in_the_order_of_names(dataset, tmp_path) -> None:
    for name, rows in {"b": [3, 4], "a": [0], "c": [1]}.items():
        dataset.select(rows).to_parquet(tmp_path / f"{name}.parquet")
    reader = DatasetPairReader(str(tmp_path / "[ab].parquet"))
    assert reader.prompts() == ["prompt 0", "prompt 3", "prompt 4"]
    assert reader.pair_ids() == ["a.parquet:0", "b.parquet:0", "b.parquet:1"]
    with pytest.raises(InputError, match=r"source: no file matches .*\*\.arrow; give a pattern"):
        DatasetPairReader(str(tmp_path / "*.arrow"))
    (tmp_path / "other").mkdir()
    dataset.to_parquet(tmp_path / "other" / "a.parquet")
    with pytest.raises(InputError, match=r"matches several files a\.parquet; rows are named by their file"):
        DatasetPairReader(str(tmp_path / "**" / "*.parquet"))


def test_columns_of_other_names(dataset) -> None:
    table = dataset.rename_columns({"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"})
    table = table.add_column("label_0", [1.0, 0.0, 0.5, None, 0.25]).add_column("uid", list("abcde"))
    names = {"prompt": "caption", "image_a": "jpg_0", "image_b": "jpg_1"}
    reader = DatasetPairReader(table, columns={**names, "label": "label_0", "key_a": "uid", "pair_id": "uid"})
    assert reader.labels()[:3].tolist() == [1.0, 0.0, 0.5]
    assert reader.labelled().tolist() == [True, True, True, False, True]
    assert (reader[1].pair_id, reader[1].image_a.image_key, len(reader[1].image_b.image_key)) == ("b", "b", 32)
    assert DatasetPairReader(table, columns=names).remarks["unlabelled (no label)"] == 5


def test_decimal_labels_are_numbers_and_a_split_without_rows_tells_why(dataset, tmp_path) -> None:
    table = dataset.rename_columns({"chosen": "image_a", "rejected": "image_b"}).data.table
    decimals = [Decimal(text) for text in ("1.0", "0.0", "0.5", "0.25", "0.75")]
    pq.write_table(table.append_column("label", pa.array(decimals)), tmp_path / "train.parquet")
    reader = DatasetPairReader(str(tmp_path / "train.parquet"), randomise_sides=False)
    assert reader.labels().tolist() == [1.0, 0.0, 0.5, 0.25, 0.75]
    pq.write_table(table.append_column("label", pa.array([True] * 5)), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"no rows left; 5 label not readable left out; .*:0: label is .*; check"):
        DatasetPairReader(str(tmp_path / "train.parquet"), on_error="skip")


def test_files_of_other_types_are_read_together_or_named(dataset, tmp_path) -> None:
    labels = {"00000": [0, 1, 0, 1, 1], "00001": [0.5, 0.25, None, 1.0, 0.0], "00002": [None] * 5}
    table = dataset.rename_columns({"chosen": "image_a", "rejected": "image_b"})
    for number, values in labels.items():
        table.add_column("label", values).to_parquet(tmp_path / f"train-{number}-of-00003.parquet")
    reader = DatasetPairReader(str(tmp_path))
    assert reader.labels()[:7].tolist() == [0, 1, 0, 1, 1, 0.5, 0.25]
    assert reader.labelled().sum() == 9
    table.add_column("label", ["a"] * 5).to_parquet(tmp_path / "train-00002-of-00003.parquet")
    with pytest.raises(InputError, match=r"no types as in the other files \(.*\); give every file .* same columns"):
        DatasetPairReader(str(tmp_path))


def as_views(table: pa.Table) -> pa.Table:
    views = {
        "prompt": pa.string_view(),
        "image_a": pa.binary_view(),
        "image_b": pa.binary_view(),
        "label": pa.float64(),
    }
    return table.cast(pa.schema(views))


def as_dictionaries(table: pa.Table) -> pa.Table:
    return pa.table({name: table.column(name).combine_chunks().dictionary_encode() for name in table.column_names})


def as_structs(table: pa.Table) -> pa.Table:
    kind = pa.struct({"bytes": pa.binary_view(), "path": pa.string_view()})
    for place, name in ((1, "image_a"), (2, "image_b")):
        values = [{"bytes": data, "path": None} for data in table.column(name).to_pylist()]
        table = table.set_column(place, name, pa.array(values, kind))
    return table


@pytest.mark.parametrize("change", [as_views, as_dictionaries, as_structs])
def test_columns_count_by_what_they_hold_in_every_reader(rows, tmp_path, change) -> None:
    columns = {
        "prompt": rows["prompt"],
        "image_a": rows["chosen"],
        "image_b": rows["rejected"],
        "label": [1, 0, 0.5, 1, 0],
    }
    pq.write_table(change(pa.table(columns)), file := str(tmp_path / "train.parquet"))
    expected = [*zip(*columns.values(), strict=True)]
    openers = [DatasetPairReader, partial(DatasetPairReader, memory_map=True), partial(PairStream, shuffle_buffer=1)]
    for opener in openers:
        reader = opener(file)
        pairs = reader.pairs(0, 1, 0, print) if isinstance(reader, PairStream) else (reader[n] for n in range(5))
        assert [(pair.prompt, pair.image_a.data, pair.image_b.data, pair.label_a) for pair in pairs] == expected


def as_bytes(pictures: list[bytes]) -> pa.Array:
    return pa.array(pictures, pa.binary())


def as_list_of_structs(pictures: list[bytes]) -> pa.Array:
    kind = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    return pa.array([[{"bytes": data, "path": "x.jpg"}] * 2 for data in pictures], kind)


@pytest.mark.parametrize("column", [as_bytes, as_list_of_structs])
def test_pictures_to_edit_are_read_from_tables_and_streams(rows, tmp_path, jpeg, column) -> None:
    pictures = [jpeg((n // 2 * 90, 200, 9)) for n in range(5)]
    images = {"image_a": rows["chosen"], "image_b": rows["rejected"]}
    table = pa.table({"prompt": ["make it red"] * 5, **images, "label": [1.0] * 5, "source_image": column(pictures)})
    pq.write_table(table, file := str(tmp_path / "train.parquet"), row_group_size=2)
    number = 1 if column is as_bytes else 2
    openers = [DatasetPairReader, partial(DatasetPairReader, memory_map=True), partial(PairStream, shuffle_buffer=1)]
    for opener in openers:
        reader = opener(file)
        stream = isinstance(reader, PairStream)
        pairs = [*reader.pairs(0, 1, 0, print)] if stream else [reader[n] for n in range(5)]
        assert [[source.data for source in sources_of(pair.prompt)] for pair in pairs] == [
            [p] * number for p in pictures
        ]
        if stream:
            continue
        assert named(reader.prompts()) == named(pair.prompt for pair in pairs)
        assert not any(source.data for prompt in reader.prompts() for source in sources_of(prompt))
        assert [len({*reader.groups()}), len({*map(str, reader.prompts())})] == [3, 1]
        assert len(PairDataset(pickle.loads(pickle.dumps(reader)), LOADER)[4].sources) == number
        assert opener(file, sources="ignore").prompts() == ["make it red"] * 5
    keyed = table.append_column("source_keys", pa.array([[f"{n}"] * number for n in range(5)]))
    pq.write_table(keyed, file)
    assert [sources_of(prompt)[-1].image_key for prompt in DatasetPairReader(file).prompts()] == [*"01234"]
    pq.write_table(table.rename_columns([*table.column_names[:-1], "input_image"]), file)
    for opener in openers:
        with pytest.raises(
            InputError, match=r"'input_image' is a picture to edit.*columns: {source_images: input_image}"
        ):
            opener(file)
        assert opener(file, columns={"source_images": "input_image"}).sources == "read"


def test_paths_of_pictures_to_edit_lie_in_the_root(rows, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(rows["chosen"][0])
    columns = {"prompt": ["x"], "image_a": ["in/a.jpg"], "image_b": ["in/a.jpg"], "label": [0.0]}
    for value, problem in (["in/a.jpg"], ""), (["../a.jpg"], r"source_images '\.\./a\.jpg' leads out of"):
        pq.write_table(pa.table({**columns, "source_images": [value]}), file := str(tmp_path / "train.parquet"))
        if problem:
            with pytest.raises(InputError, match=problem):
                DatasetPairReader(file)
        else:
            assert torch.equal((loaded := PairDataset(DatasetPairReader(file), LOADER)[0]).sources[0], loaded.pixels_a)
    beside = pa.table(
        {**columns, "image_a": rows["chosen"][:1], "image_b": rows["chosen"][:1], "source_images": [["x"]]}
    )
    pq.write_table(beside, file)
    assert sources_of(DatasetPairReader(file)[0].prompt)[0].path == tmp_path / "x"


def test_a_text_that_is_not_utf_8_is_one_line(rows, tmp_path) -> None:
    """Pyarrow does not check texts when it writes parquet."""
    offsets = np.arange(6, dtype=np.int32)
    texts = pa.StringArray.from_buffers(5, pa.py_buffer(offsets), pa.py_buffer(b"\xff" + b"a" * 4))
    pq.write_table(pa.table(rows).set_column(0, "prompt", texts), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet: column prompt is damaged \(.*UTF8.*\); write it again"):
        DatasetPairReader(str(tmp_path))


def test_a_parquet_of_a_stranger_names_no_files_elsewhere(tmp_path, jpeg) -> None:
    """The struct of an image may hold a path in place of bytes; in a data set made in this process, any path."""
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "set").mkdir()
    image = {"bytes": None, "path": str(tmp_path / "secret.jpg")}
    column = pa.array([image], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"prompt": ["x"], "chosen": column, "rejected": column}), tmp_path / "set/train.parquet")
    with pytest.raises(ImageError, match=r"path outside the root .*allow_outside"):
        PairDataset(DatasetPairReader(str(tmp_path / "set")), LOADER)[0]
    own = Dataset.from_dict({"prompt": ["x"], "chosen": [image], "rejected": [image], "confidence": [None]}, FEATURES)
    assert PairDataset(DatasetPairReader(own), LOADER)[0].pixels_a.shape == (3, 8, 8)
