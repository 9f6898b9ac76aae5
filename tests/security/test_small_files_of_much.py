"""A file of a few kilobytes that would become gigabytes, or take seconds of decoding, is refused with one line."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data import ImageError, decode_image
from latentreward.data.images import UNKNOWN, png
from latentreward.data.readers import tables, tars
from latentreward.data.readers.tables import ParquetPart, RowGroupColumns, read_parquet
from latentreward.data.readers.tars import ImageArchives
from latentreward.reward.scoring.files import read_tensors


def test_a_member_of_a_zip_file_is_no_larger_than_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "train_1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (("a.png", png(Image.new("1", (9000, 9000)))), ("train_1.json", b"")):
            archive.writestr(name, data.ljust(2**20 + 1, b"\0"))
    parts = ImageArchives([tmp_path / "train_1.zip"])
    with pytest.raises(InputError, match=r"1048577 bytes; at most 1048576 are read"):
        parts._member("train_1", "train_1.json")
    with pytest.raises(ImageError, match="damaged"):  # of one row among others, which `on_error` may skip
        decode_image(parts.image("train_1", "a.png"))


def test_compressed_records_of_torch_save(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2**20)}, tmp_path / "plain.pt")
    assert read_tensors(tmp_path / "plain.pt")["weight"].shape == (2**20,)
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.pt").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"cannot load .*packed\.pt: it is damaged, .* records unpack to 4\d+ bytes"):
        read_tensors(tmp_path / "packed.pt")


def test_a_value_that_stands_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST_LIMIT", 2**24)
    part = ParquetPart("train.parquet", tmp_path / "train.parquet")
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1200, np.int32)), pa.array(["x" * 2_000_000]))
    pq.write_table(pa.table({"prompt": long}), part.path, compression="zstd", store_schema=False)
    assert part.path.stat().st_size < 10_000
    for read in (
        lambda: read_parquet([part], {"prompt": None}, ""),
        lambda: RowGroupColumns([part], ["prompt"]).read(0, 5),
    ):
        with pytest.raises(ImageError, match=r"over \d+ bytes of values in a file of far fewer"):
            read()


def test_images_in_a_dictionary_count_as_often_as_rows_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LEAST_LIMIT", 2**20)
    part = ParquetPart("train.parquet", tmp_path / "train.parquet")
    images = pa.array([np.random.default_rng(seed).bytes(100_000) for seed in range(60)])
    pq.write_table(pa.table({"image": images.dictionary_encode()}), part.path)
    assert RowGroupColumns([part], ["image"]).read(0, 5) == (images[5].as_py(),)
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), images[:1])
    pq.write_table(pa.table({"image": repeated}), part.path)
    with pytest.raises(ImageError, match=r"over \d+ bytes of values in a file of far fewer"):
        RowGroupColumns([part], ["image"]).read(0, 5)


def test_rows_are_read_as_before(tmp_path: Path) -> None:
    part = ParquetPart("train.parquet", tmp_path / "train.parquet")
    table = pa.table({"b": [{"x": n} for n in range(9)], "a": [f"{n % 2}" for n in range(9)], "c": [b"1"] * 9})
    pq.write_table(table, part.path, row_group_size=4)
    assert read_parquet([part], {"a": None, "c": None}, "")[0].to_pylist() == table.select(["a", "c"]).to_pylist()
    assert RowGroupColumns([part], ["a", "b"]).read(0, 6) == ("0", {"x": 6})


def test_a_bmp_of_runs_is_refused() -> None:
    side, runs = 4096, b"\xff\x01" * 16 + b"\x10\x01\x00\x00"
    pixels = runs * 4 + b"\x00\x01"
    head = np.array([40, side, side], "<i4").tobytes() + np.array([1, 8], "<i2").tobytes()
    head += np.array([1, len(pixels), 0, 0, 256, 0], "<i4").tobytes() + bytes(1024)
    data = b"BM" + np.array([14 + len(head) + len(pixels), 0, 14 + len(head)], "<i4").tobytes() + head + pixels
    with pytest.raises(ImageError, match="a BMP of runs; save it as PNG") as error:
        decode_image(ImageRef("x", io.BytesIO(data).getvalue()))
    assert error.value.problem == UNKNOWN
