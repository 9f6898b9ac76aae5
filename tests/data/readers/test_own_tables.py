"""One table of pairs in every format: columns and labels by maps, whole numbers never taken for probabilities."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.errors import InputError
from latentreward.data import DatasetPairReader, JSONLPairReader, PairReader
from latentreward.data.format_detection import recognise

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COLUMNS = {"prompt": "text", "image_a": "left", "image_b": "right", "label": "winner"}
MODES = ("raise", "skip", "placeholder")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    names = [*rows[0]]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix in (".csv", ".tsv"):
        writer = csv.DictWriter(stream := io.StringIO(), names, delimiter="," if file.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(stream.getvalue())
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(file)


def tool_rows(*winners: Any) -> list[dict[str, Any]]:
    return [{"text": f"p {n}", "left": f"{n}a.png", "right": f"{n}b.png", "winner": w} for n, w in enumerate(winners)]


def told(reader: PairReader) -> list[tuple[Any, ...]]:
    pairs = [reader[row] for row in range(len(reader))]
    return [(pair.prompt, pair.image_a.image_key, pair.image_b.image_key, pair.label_a) for pair in pairs]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_table_of_a_labelling_tool_is_read_by_two_maps(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"train{suffix}", tool_rows("left", "right", "tie", None))
    expected = [(f"p {n}", f"{n}a.png", f"{n}b.png", label) for n, label in enumerate((1.0, 0.0, 0.5, None))]
    options: dict[str, Any] = {"columns": COLUMNS, "labels": {"left": "a", "right": "b", "tie": "tie"}}
    for source in (file, str(tmp_path)):
        assert told(DatasetPairReader(source, **options)) == expected
    if suffix != ".parquet":
        assert told(JSONLPairReader(file, **options)) == expected
    with pytest.raises(InputError, match="it has text, left, right, winner"):
        DatasetPairReader(file)
    with pytest.raises(InputError, match=r"columns\.prompt: no column 'txt' in .*; did you mean 'text'"):
        DatasetPairReader(file, columns={**COLUMNS, "prompt": "txt"})
    with pytest.raises(InputError, match="label is 'right', none of labels: left"):
        DatasetPairReader(file, columns=COLUMNS, labels={"left": "a"})
    with pytest.raises(InputError, match="labels: left has no meaning; give a, b, tie"):
        DatasetPairReader(file, columns=COLUMNS, labels={"left": "first"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whole_numbers_need_a_map(tmp_path: Path, suffix: str) -> None:
    """The number of the winner, counted from 0 or from 1, is the commonest label; as a probability it is inverted."""
    for winners, labels in (((0, 1, 0), {0: "a", 1: "b"}), ((1, 2, 1), {1: "a", 2: "b"}), ((1, 1, 1), {"1": "a"})):
        file = write(tmp_path / f"train{suffix}", tool_rows(*winners))
        for on_error in MODES:
            with pytest.raises(InputError, match="labels"):
                DatasetPairReader(file, columns=COLUMNS, on_error=on_error)
            reader = DatasetPairReader(file, columns=COLUMNS, on_error=on_error, labels=labels)
            assert reader.labels().tolist() == [float(winner == winners[0]) for winner in winners]
    file = write(tmp_path / f"train{suffix}", tool_rows(1.0, 0.0, 0.25))
    assert DatasetPairReader(file, columns=COLUMNS).labels().tolist() == [1.0, 0.0, 0.25]


@pytest.mark.parametrize("suffix", SUFFIXES[:4])
def test_tables_of_text_are_recognised_or_their_columns_named(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"train{suffix}", [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])
    for place in (tmp_path, file):
        (build,) = recognise(str(place)).values()
        assert told(build(randomise_sides=False)) == [("x", "a.png", "b.png", 1.0)]
    if suffix in (".csv", ".tsv"):
        with pytest.raises(
            InputError, match="columns no reader knows: left, right, text, winner; name those of a pair"
        ):
            recognise(write(tmp_path / f"other{suffix}", tool_rows("left")))


def test_a_file_of_another_suffix_is_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text('{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}')
    assert told(JSONLPairReader(str(file), randomise_sides=False)) == [("x", "a.png", "b.png", 1.0)]


@pytest.mark.parametrize("name", ["source", "Input", "image_before", "before_image"])
def test_a_picture_to_edit_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    """In a table of text, a text alone under such a name may be anything."""
    row = {"prompt": "make it red", "chosen": "a.png", "rejected": "b.png", name: "c.png"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    bytes_ = {key: [value if key == "prompt" else value.encode()] for key, value in row.items()}
    pq.write_table(pa.table(bytes_), tmp_path / "train.parquet")
    for file in ("train.json", "train.parquet"):
        with pytest.raises(InputError, match=f"'{name}' is a picture to edit"):
            DatasetPairReader(str(tmp_path / file))
        assert len(DatasetPairReader(str(tmp_path / file), sources="ignore")) == 1
    if name == "source":
        (tmp_path / "train.json").write_text(json.dumps([{**row, name: "a labelling tool"}]))
        assert len(DatasetPairReader(str(tmp_path / "train.json"))) == 1
