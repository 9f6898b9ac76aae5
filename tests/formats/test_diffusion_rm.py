"""The released cache, and Pick-a-Pic without images, against a sample set and against odd rows written here."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.data import DiffusionRMReader, ImageError, PickAPicReader
from latentreward.data.images import decode_latents

GIVEN = Path(os.environ.get("LATENTREWARD_SAMPLES_DIR") or Path(__file__).with_name("data"))


def to_bytes(size: tuple[int, int], dtype: str = "float32") -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.full((16, *size), 0.5, dtype))
    return stream.getvalue()


def write_odd_cache(root: Path) -> dict[str, Any]:
    """Good rows of two sizes and precisions, damaged latents, and index rows that lead nowhere."""
    square, tall = to_bytes((32, 32)), to_bytes((128, 96), "float16")
    cells = [(square, square), (tall, tall), (square[:-9], square), (square, b""), (None, square), (b"junk", b"junk")]
    prompts = ["plain", "x" * 3000, "عربي 🦊\n\n", "", None, "plain"]
    rows = [
        {"prompt": prompt, "latent1": cell[0], "latent2": cell[1], "detailed_results": "{'votes_chosen': None}"}
        for prompt, cell in zip(prompts, cells, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:4]), root / "part_rank00.parquet", row_group_size=3)
    pq.write_table(pa.Table.from_pylist(rows[4:]), root / "part_rank01.parquet", row_group_size=3)
    index: list[tuple[Any, ...]] = [
        ("part_rank00.parquet", 0, 0, 256, 256),
        ("/else/where/part_rank00.parquet", 0, 1, 768, 1024),
        ("part_rank00.parquet", 0, 2, 256, 256),
        ("part_rank00.parquet", 1, 0, 256, 256),
        ("part_rank01.parquet", 0, 0, 256, 256),
        ("part_rank01.parquet", 0, 1, 256, 256),
        ("part_rank02.parquet", 0, 0, 256, 256),
        ("part_rank00.parquet", 0, 0, 700, 700),
        ("part_rank00.parquet", 7, 0, 256, 256),
        ("part_rank00.parquet", "", 0, 256, 256),
    ]
    with (root / "bucket_index.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id"])
        writer.writerows((number, *row, 99) for number, row in enumerate(index))
    return {"rows": len(rows), "index_rows": len(index), "bad_index_rows": list(range(2, len(index)))}


@pytest.fixture(params=["given", "odd"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if request.param == "given":
        return str(GIVEN / "diffusion_rm"), json.loads((GIVEN / "EXPECTED.json").read_text())["diffusion_rm"]
    return str(tmp_path), write_odd_cache(tmp_path)


def is_whole(reader: DiffusionRMReader, row: int) -> bool:
    """Whether a row is there and both of its latents decode, to the size that its index states."""
    pair = reader[row]
    try:
        return pair.label_a is not None and all(decode_latents(image).ndim for image in (pair.image_a, pair.image_b))
    except ImageError:
        return False


def check_bad_rows(found: list[int], stated: list[int | str] | dict[str, str]) -> None:
    """Rows found are those stated: by number, as row → kind, or by as many words as there are bad rows."""
    numbers = {str(row) for row in stated}
    if all(number.isdecimal() for number in numbers):
        assert {str(row) for row in found} == numbers
    assert len(found) == len(stated)


def test_exactly_the_bad_index_rows_are_refused(cache) -> None:
    root, expected = cache
    reader = DiffusionRMReader(root, on_error="placeholder")
    assert len(reader) == expected["index_rows"]
    with Path(root, "bucket_index.csv").open(newline="") as stream:
        place = {f"bucket_index.csv:{row['global_id']}": number for number, row in enumerate(csv.DictReader(stream))}
    bad = [row for row in range(len(reader)) if not is_whole(reader, row)]
    check_bad_rows([place[reader.pair_ids()[row]] for row in bad], expected["bad_index_rows"])
    kept = DiffusionRMReader(root, on_error="skip")
    assert len(kept) + kept.skipped.total() == expected["index_rows"]
    names = {reader.pair_ids()[row] for row in range(len(reader)) if row not in bad}
    assert {kept.pair_ids()[row] for row in range(len(kept)) if is_whole(kept, row)} == names


def test_every_row_without_the_index(cache) -> None:
    root, expected = cache
    reader = DiffusionRMReader(root, None, on_error="skip", randomise_sides=False)
    assert len(reader) == expected["rows"]
    for number, prompt in enumerate(reader.prompts()):
        pair = reader[number]
        assert (pair.prompt, pair.label_a) == (prompt, 1.0)
        if is_whole(reader, number):
            assert decode_latents(pair.image_a).shape == decode_latents(pair.image_b).shape


def test_pickapic_without_images_has_the_labels_of_the_copy_with_them() -> None:
    expected = json.loads((GIVEN / "EXPECTED.json").read_text())["pickapic_v1"]
    table, images = (
        PickAPicReader(str(GIVEN / name), "train", images=option, on_error="placeholder")
        for name, option in (("pickapic_v1_no_images", "none"), ("pickapic_v1", "read"))
    )
    assert len(table) == len(images) == expected["train_rows"]
    np.testing.assert_array_equal(table.labels(), images.labels())
    assert table.prompts() == images.prompts()
    for n in range(len(table)):
        assert table[n].weight == images[n].weight
        assert table[n].image_a.data is None
