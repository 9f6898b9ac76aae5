"""export-pairs: any reader's pairs as a data set of `datasets`, and back again as the same pairs."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from latentreward.apps.cli import main
from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.data import DatasetPairReader, HPDv3Reader, JSONLPairReader, PairReader, PairStream, PickAPicReader
from latentreward.data.dataset_export import export_split
from latentreward.data.format_detection import recognise
from latentreward.data.readers.base import normalise_prompt


@pytest.fixture
def pairs(tmp_path: Path, jpeg) -> Path:
    """Seven pairs of three pictures as JSON lines; one has no label, one says who won by order."""
    (tmp_path / "own").mkdir()
    for n, name in enumerate("abc"):
        (tmp_path / "own" / f"{name}.jpg").write_bytes(jpeg((60 * n, 9, 9)))
    rows = [{"prompt": f"p {n}", "image_a": "a.jpg", "image_b": "b.jpg", "label": n / 10} for n in range(5)]
    rows[2] |= {"votes": [3, 1], "confidence": 0.5, "weight": 2, "group_id": "g", "model_a": "x", "model_b": "y"}
    rows[4] |= {"noise_a": "0 4/0 16x8x8", "noise_b": "0 4/1 16x8x8"}
    rows[3]["label"] = None
    rows += [
        {"prompt": "p 5", "chosen": "c.jpg", "rejected": "a.jpg"},
        {"prompt": "ü\n🦊", "chosen": "b.jpg", "rejected": "c.jpg"},
    ]
    file = tmp_path / "own" / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def same(one: PairReader, other: PairReader) -> bool:
    """Whether two readers give the same pairs: all fields, and the bytes of the images."""

    def plain(reader: PairReader) -> list[object]:
        found = []
        for pair in (reader[n] for n in range(len(reader))):
            images = [
                (image.image_key, image.data or image.path.read_bytes(), image.noise)
                for image in (pair.image_a, pair.image_b)
            ]
            prompt = normalise_prompt(pair.prompt)  # with the names of the pictures that it edits
            found.append((replace(pair, prompt=prompt, image_a=None, image_b=None, source="", split=""), *images))
        return found

    return plain(one) == plain(other)


def test_pairs_come_back_as_they_were(pairs, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    reader = ["--reader=JSONLPairReader", f"--reader.file={pairs}"]
    main(["export-pairs", str(out), *reader, "--rows_per_file=3"])
    assert "7 pairs of train in 3 files (3 written now)" in capsys.readouterr().out
    assert same(DatasetPairReader(str(out)), JSONLPairReader(str(pairs)))
    assert list(recognise(str(out))) == ["train"]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert (loaded[0]["image_a"].size, loaded[2]["votes"], loaded[3]["label"]) == ((20, 12), [3, 1], None)
    assert same(DatasetPairReader(loaded), JSONLPairReader(str(pairs)))
    streamed = PairStream(str(out), shuffle_buffer=1).pairs(0, 1, 0, lambda reason: None)
    noises = {pair.pair_id: (pair.image_a.noise, pair.image_b.noise) for pair in streamed}
    assert noises.pop("train.jsonl:5") == ("0 4/0 16x8x8", "0 4/1 16x8x8")
    assert {*noises.values()} == {(None, None)}

    second = sorted((out / "data").iterdir())[1]
    whole, others = second.read_bytes(), {file: file.stat().st_mtime_ns for file in (out / "data").iterdir()}
    second.unlink()
    main(["export-pairs", str(out), *reader, "--rows_per_file=3"])
    assert "3 files (1 written now)" in capsys.readouterr().out
    assert second.read_bytes() == whole
    assert all(file.stat().st_mtime_ns == times for file, times in others.items() if file != second)
    for change in (["--rows_per_file=4"], ["--reader.seed=1", "--rows_per_file=3"]):
        with pytest.raises(SystemExit) as stop:
            main(["export-pairs", str(out), *reader, *change])
        assert stop.value.code == 2
        assert "was begun with " in (line := capsys.readouterr().err) and "; choose another folder, or delete " in line


def test_published_readers_and_several_splits(tmp_path, write_pickapic, pickapic_rows, write_hpdv3, hpdv3_rows) -> None:
    readers = {
        "train": PickAPicReader(write_pickapic([pickapic_rows(n) for n in range(4)]), "train"),
        "test_tf": HPDv3Reader(write_hpdv3([hpdv3_rows(n) for n in range(3)]), "train"),
    }
    for split, reader in readers.items():
        export_split(reader, tmp_path / "out", split, {"rows": len(reader)})
    for split, reader in readers.items():
        assert same(DatasetPairReader(str(tmp_path / "out"), split), reader)
    assert set(recognise(str(tmp_path / "out"))) == set(readers)


def test_images_that_cannot_be_read_follow_on_error(pairs, tmp_path) -> None:
    (pairs.parent / "c.jpg").unlink()
    (pairs.parent / "b.jpg").write_bytes(b"no picture")
    readers = {name: JSONLPairReader(str(pairs), on_error=name) for name in ("raise", "skip", "placeholder")}
    with pytest.raises(InputError, match=r"train\.jsonl:1: image 'b\.jpg': unknown .*; replace the file, or set"):
        export_split(readers["raise"], tmp_path / "raise", "train", {})
    assert not any((tmp_path / "raise" / "data").glob("*"))
    with pytest.raises(InputError, match="has no rows left"):
        assert export_split(readers["skip"], tmp_path / "skip", "train", {}).left_out == 7
        DatasetPairReader(str(tmp_path / "skip"))
    assert export_split(readers["placeholder"], tmp_path / "placeholder", "train", {}).rows == 7
    reader = DatasetPairReader(str(tmp_path / "placeholder"))
    assert not reader.labelled().any()
    assert (reader[0].image_a.data is None, reader[0].image_b.data is None) == (False, True)


def test_wrong_settings_are_one_line(pairs, tmp_path) -> None:
    reader = JSONLPairReader(str(pairs))
    with pytest.raises(InputError, match=r"split is 'train/aes'; give a name of letters"):
        export_split(reader, tmp_path, "train/aes", {})
    with pytest.raises(InputError, match="rows_per_file is 0; it must be at least 1"):
        export_split(reader, tmp_path, "train", {}, 0)
    reader.holds = "latents"
    with pytest.raises(InputError, match="reader: JSONLPairReader holds latents; only images"):
        export_split(reader, tmp_path, "train", {})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    reader.holds = "images"
    with pytest.raises(InputError, match="holds files of train that no export wrote; choose another folder"):
        export_split(reader, tmp_path, "train", {})


def test_a_random_row_costs_few_rows(pairs, tmp_path) -> None:
    lines = pairs.read_text().split("\n")
    pairs.write_text("\n".join(lines[:5] * 20))
    (file,) = export_split(JSONLPairReader(str(pairs)), tmp_path / "out", "train", {}).files
    groups = pq.ParquetFile(file).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [32, 32, 32, 4]


def test_pictures_to_edit_come_back_with_their_names(pairs, tmp_path) -> None:
    row = {"prompt": "make it red", "image_a": "b.jpg", "image_b": "c.jpg", "label": 1.0}
    lines = [{**row, "source_images": ["a.jpg"]}, row, {**row, "source_images": ["c.jpg", "a.jpg"]}]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    reader = JSONLPairReader(str(pairs))
    export_split(reader, tmp_path / "out", "train", {})
    again = DatasetPairReader(str(tmp_path / "out"))
    assert same(again, reader)
    assert [*map(normalise_prompt, again.prompts())] == [*map(normalise_prompt, reader.prompts())]
    data = [[source.data for source in sources_of(again[row].prompt)] for row in range(3)]
    assert data == [
        [(pairs.parent / name).read_bytes() for name in names] for names in (["a.jpg"], [], ["c.jpg", "a.jpg"])
    ]
    pairs.write_text("\n".join(map(json.dumps, [{**row, "source_images": ["gone.jpg"]}, row])))
    with pytest.raises(InputError, match=r"train\.jsonl:1: image 'gone\.jpg': missing file"):
        export_split(JSONLPairReader(str(pairs)), tmp_path / "raise", "train", {})
    assert export_split(JSONLPairReader(str(pairs), on_error="skip"), tmp_path / "skip", "train", {}).rows == 1
