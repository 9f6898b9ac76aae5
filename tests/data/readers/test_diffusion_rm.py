"""The released cache: index, odd index rows, latents as bytes."""

import csv
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data import DiffusionRMReader, ImageError, PairDataset, PixelLoader
from latentreward.data.images import decode_latents

COLUMNS = ("global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id")
DETAILS = "{'votes_chosen': 8, 'votes_rejected': 2, 'confidence': 0.98, 'orig_chosen_hw': [256, 256]}"


def to_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def latents(seed: int, size: tuple[int, int] = (32, 32), dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((16, *size)).astype(dtype)


def cache_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": f"prompt {number}",
        "model1": "flux",
        "model2": "sd3",
        "detailed_results": DETAILS,
        "latent1": to_bytes(latents(2 * number)),
        "latent2": to_bytes(latents(2 * number + 1)),
        "latent1_shape": [16, 32, 32],
        "latent2_shape": [16, 32, 32],
    }
    return {**row, **changes}


@pytest.fixture
def write_cache(tmp_path: Path):
    """Write parts of rows in groups of 2 and, if index rows are given, the index; returns the root."""

    def write(parts: list[list[dict[str, Any]]], index: list[dict[str, Any]] | None = None) -> str:
        for number, rows in enumerate(parts):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"part_rank{number:02d}.parquet", row_group_size=2)
        if index is not None:
            with (tmp_path / "bucket_index.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                writer.writeheader()
                writer.writerows(index)
        return str(tmp_path)

    return write


def index_row(number: int, part: int = 0, group: int = 0, row: int = 0, **changes: Any) -> dict[str, Any]:
    values = (number, f"/elsewhere/part_rank{part:02d}.parquet", group, row, 256, 256, 7)
    return {**dict(zip(COLUMNS, values, strict=True)), **changes}


def test_index_rows_point_into_row_groups(write_cache) -> None:
    parts = [[cache_row(0), cache_row(1), cache_row(2)], [cache_row(3)]]
    index = [
        index_row(10, group=1),
        index_row(11, part=1),
        index_row(12, row=1, parquet_path="C:\\x\\part_rank00.parquet"),
    ]
    reader = DiffusionRMReader(write_cache(parts, index), randomise_sides=False)
    assert reader.prompts() == ["prompt 1", "prompt 2", "prompt 3"]  # as they lie in the files
    assert reader.pair_ids() == ["bucket_index.csv:12", "bucket_index.csv:10", "bucket_index.csv:11"]
    pair = reader[1]
    assert (pair.label_a, pair.source, pair.image_a.holds) == (1.0, "diffusion_rm", "latents")
    np.testing.assert_array_equal(decode_latents(pair.image_a), latents(4))
    np.testing.assert_array_equal(decode_latents(pair.image_b), latents(5))
    keys = {image.image_key for n in range(3) for image in (reader[n].image_a, reader[n].image_b)}
    assert len(keys) == 6
    assert pickle.loads(pickle.dumps(reader))[1] == reader[1]


def test_reading_in_order_decodes_each_row_group_once(write_cache) -> None:
    rows = [cache_row(n) for n in range(8)]
    index = [index_row(n, group=n % 4, row=n // 4) for n in range(8)]
    reader = DiffusionRMReader(write_cache([rows], index))
    assert reader.prompts() == [f"prompt {n}" for n in range(8)]
    assert all(reader[n].label_a is not None for n in range(8))
    assert reader._latents._groups.row_groups_read == 4


ODD = {
    "index row not readable": {"row_group": "x"},
    "parquet part missing": {"parquet_path": "part_rank09.parquet"},
    "row beyond the parquet part": {"row_index": 2},
    "size is no bucket": {"width": 700, "height": 700},
    "latents of another size than the index says": {"width": 512, "height": 512},
}


@pytest.mark.parametrize("reason", ODD)
def test_odd_index_rows_follow_on_error(write_cache, reason) -> None:
    index = [index_row(0), index_row(1, **ODD[reason]), index_row(2, group=1)]
    root = write_cache([[cache_row(n) for n in range(3)]], index)
    with pytest.raises(InputError, match=r"^bucket_index.csv:1: .*; correct the row"):
        DiffusionRMReader(root)
    reader = DiffusionRMReader(root, on_error="skip")
    assert reader.prompts() == ["prompt 0", "prompt 2"]
    assert dict(reader.skipped) == {reason: 1}
    reader = DiffusionRMReader(root, on_error="placeholder")
    assert reader.labelled().tolist() == [True, True, False]
    assert (reader[2].pair_id, reader[2].label_a, reader[2].prompt) == ("bucket_index.csv:1", None, "")
    assert dict(reader.remarks) == {reason: 1}


@pytest.mark.parametrize("value", ["", "-1", "0.5", "1e400", "nan"])
def test_numbers_of_the_index(write_cache, value) -> None:
    root = write_cache([[cache_row(0)]], [index_row(0), index_row(0, row_group=value)])
    assert dict(DiffusionRMReader(root, on_error="skip").skipped) == {"index row not readable": 1}


def test_further_rows_beyond_a_group_and_repeated_ids(write_cache) -> None:
    rows = [cache_row(n) for n in range(3)]
    index = [index_row(5, group=1), index_row(5), index_row(5, group=1, row=1), index_row(5, group=2)]
    reader = DiffusionRMReader(write_cache([rows], index), on_error="skip")
    assert sorted(reader.pair_ids()) == ["bucket_index.csv:5", "bucket_index.csv:line 3"]
    assert reader.skipped == {"row beyond the parquet part": 2}


def test_wrong_folders_and_columns(write_cache, tmp_path) -> None:
    (tmp_path / "bucket_index.csv").write_text("a,b\n1,2\n")
    root = write_cache([[cache_row(0)]])
    with pytest.raises(InputError, match="no column global_id, parquet_path"):
        DiffusionRMReader(root)
    (tmp_path / "bucket_index.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(InputError, match="has no rows left"):
        DiffusionRMReader(root)
    with pytest.raises(InputError, match=r"index: .* is one file.*set index to null"):
        DiffusionRMReader(f"{root}/part_rank00.parquet")
    assert len(DiffusionRMReader(f"{root}/part_rank00.parquet", None)) == 1
    (tmp_path / "part_rank01.parquet").write_bytes(b"PAR1 garbage")
    with pytest.raises(InputError, match=r"part_rank01.parquet: not a whole parquet file"):
        DiffusionRMReader(root, None)


def test_training_on_it_is_refused(write_cache) -> None:
    reader = DiffusionRMReader(write_cache([[cache_row(0, prompt=None)]]), None, on_error="skip")
    assert (reader.prompts(), dict(reader.remarks)) == ([""], {"null prompt read as empty": 1})
    with pytest.raises(InputError, match="its rows hold latents, not images; import them with `latentreward cache`"):
        PairDataset(reader, PixelLoader(8, 8))


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[[object()]]]), allow_pickle=True)
    return stream.getvalue()


def endless() -> bytes:
    """Two bytes of an array whose header asks for 200 terabytes."""
    header_of_one = b"1), }" + b" " * 14
    return to_bytes(np.zeros((1, 1, 1), "float16")).replace(header_of_one, b"1" + b"0" * 14 + b"), }")


@pytest.mark.parametrize(
    ("data", "problem", "detail"),
    [
        (None, "no image", "the row has none"),
        (b"", "empty image", "0 bytes"),
        (b"\x93NUMPY", "truncated or damaged image", "not a whole"),
        (to_bytes(latents(0))[:-4], "truncated or damaged image", "not a whole"),
        (b"not an array at all", "truncated or damaged image", "not a whole"),
        (pickled(), "truncated or damaged image", "not a whole"),
        (endless(), "truncated or damaged image", "not a whole"),
        (to_bytes(np.zeros((1, 1, 16, 4, 4), "float32")), "truncated or damaged image", "not a (C, h, w)"),
        (to_bytes(np.zeros((16, 4, 4), "int64")), "truncated or damaged image", "not a (C, h, w)"),
        (to_bytes(np.full((16, 4, 4), np.nan, "float16")), "truncated or damaged image", "not finite"),
    ],
)
def test_damaged_latents(data, problem, detail) -> None:
    with pytest.raises(ImageError) as error:
        decode_latents(ImageRef("key", data, holds="latents"))
    assert error.value.problem == problem
    assert detail in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_both_precisions(dtype) -> None:
    array = decode_latents(ImageRef("key", to_bytes(latents(0, dtype=dtype)), holds="latents"))
    assert (array.dtype, array.shape) == (dtype, (16, 32, 32))
