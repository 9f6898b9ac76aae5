"""Published sets of image edits: one reader, the fields of each set by name, and what each row must give."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentreward.core.contracts import PreferencePair, sources_of
from latentreward.core.errors import InputError
from latentreward.data import EditPairReader, PairDataset, PixelLoader, ScoreTargets
from latentreward.data.format_detection import recognise
from latentreward.data.readers.edits import LAYOUTS
from tests.data.edit_names import named

NAMES = ("src", "a", "b", "c")
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCORES = {"model1_dim1_score": 4, "model2_dim1_score": 2, "model1_dim2_score": 2, "model2_dim2_score": 4}
TRAIN = {"prompt": "make it red", "path_src": "src", "path1": "a", "path2": "b", "model1": "M", "model2": "N"} | SCORES
TRAIN |= {"model1_overall_score": 6, "model2_overall_score": 6, "choice_dist": None, "confidence": None}
HUB = {"dev_id": 1, "instruction": "make it red", "category": "color", "source_image": "src", "left_image": "a"}
HUB |= {
    "right_image": "b",
    "left_model": "M",
    "right_model": "N",
    "left_overall_score": 6.0,
    "right_overall_score": 4.0,
}
BENCH = {"id": "g1_0", "instruction": "make it red", "source_image": "src", "candidate_1": "a", "candidate_2": "b"}
BENCH |= {"dataset": "3pair", "comparison_type": "AvsC", "ranking": "A>C", "model_1": "M", "model_2": "N"}
VOTED = {"source_prompt": "x", "target_prompt": "y", "instruct_prompt": "make it red", "source_image": "src"}
VOTED |= {"left_output_image": "a", "right_output_image": "b", "left_model": "M", "right_model": "N"}
LISTED = {"key": ["k", "l"], "instruction": "make it red", "input_image": "src", "output_images": ["a", "b"]}
RANKED = {"prompt": "make it red", "path_src": "src", "paths_generated": ["a", "b", "c"]}
JUDGED = {"key": "k", "instruction": "make it red", "source_image": "src", "edited_images": ["a", "b"], "task": "t"}
COMPASS = {"prompt": "make it red", "source_image": "src", "winner": "a", "loser": "b", "dimension": "IA"}
MMRB = {"pair_id": "p", "prompt_text": "make it red", "prompt_images": ["src", "c"], "response_a_images": ["a"]}
MMRB |= {"response_b_images": ["b"], "response_a_model": "M", "response_b_model": "N"}
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "editreward_data": [{**TRAIN, "tie_case": None}, {**TRAIN, "tie_case": True}],
    "editreward_data_hub": [{**HUB, "vote_type": vote} for vote in ("leftvote", "rightvote", "tie", None)],
    "editreward_bench": [{**BENCH, "ranking": ranking} for ranking in ("A>C", "C>A", "A=C")],
    "editreward_bench_json": [{**RANKED, "human_vote": {"ranking": "B>A=C"}}],
    "editscore_bench": [{**LISTED, "task_type": "color", "dimension": "consistency"}],
    "genai_bench_edits": [
        {**VOTED, "vote_type": vote} for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")
    ],
    "editreward_compass": [{**COMPASS, "label": label} for label in ("preference", "tie")],
    "vcreward_bench": [{**JUDGED, "winner": winner} for winner in ("Image A", "Image B")],
    "mmrb2": [{**MMRB, "chosen": chosen} for chosen in ("A", "B")],
}
MN = ("M", "N")
EXPECTED: dict[str, list[tuple[Any, ...]]] = {  # label of the first image, images, generators, group
    "editreward_data": [(1.0, "ab", MN, None), (0.5, "ab", MN, None)],
    "editreward_data_hub": [(label, "ab", MN, None) for label in (1.0, 0.0, 0.5, None)],
    "editreward_bench": [(label, "ab", MN, "g1") for label in (1.0, 0.0, 0.5)],
    "editreward_bench_json": [
        (label, images, (None, None), "train.json:0") for label, images in ((0.0, "ab"), (0.5, "ac"), (1.0, "bc"))
    ],
    "editscore_bench": [(1.0, "ab", (None, None), None)],
    "genai_bench_edits": [(label, "ab", MN, None) for label in (1.0, 0.0, 0.5, 0.5)],
    "editreward_compass": [(label, "ab", (None, None), None) for label in (1.0, 0.5)],
    "vcreward_bench": [(label, "ab", (None, None), None) for label in (1.0, 0.0)],
    "mmrb2": [(label, "ab", MN, None) for label in (1.0, 0.0)],
}
TABLES = [name for name in SAMPLES if name not in ("editreward_data", "editreward_bench_json")]


@pytest.fixture
def pictures(jpeg) -> dict[str, bytes]:
    return {name: jpeg((60 * number, 90, 9)) for number, name in enumerate(NAMES)}


@pytest.fixture
def write_json(tmp_path: Path, pictures):
    def write(rows: list[Any], suffix: str = ".json") -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        for name, data in pictures.items():
            (tmp_path / f"images/{name}.jpg").write_bytes(data)
        rows = [_replaced(row, {name: f"images/{name}.jpg" for name in NAMES}) for row in rows]
        file = tmp_path / f"train{suffix}"
        file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        return file

    return write


@pytest.fixture
def write_table(tmp_path: Path, pictures):
    def write(rows: list[dict[str, Any]]) -> Path:
        cells = {name: {"bytes": data, "path": f"{name}.jpg"} for name, data in pictures.items()}
        pq.write_table(pa.Table.from_pylist([_replaced(row, cells) for row in rows]), tmp_path / "train.parquet")
        return tmp_path / "train.parquet"

    return write


def _replaced(row: Any, values: dict[str, Any]) -> Any:
    """The row with the names of pictures replaced, also in lists."""
    if not isinstance(row, dict):
        return row
    pick = lambda value: values.get(value, value) if isinstance(value, str) else value  # noqa: E731
    return {key: [*map(pick, value)] if isinstance(value, list) else pick(value) for key, value in row.items()}


def told(pair: PreferencePair) -> tuple[Any, ...]:
    images = "".join(image.image_key.removeprefix("images/")[:1] for image in (pair.image_a, pair.image_b))
    return pair.label_a, images, (pair.model_a, pair.model_b), pair.group_id


@pytest.mark.parametrize("name", SAMPLES)
def test_json_of_every_layout(write_json, name) -> None:
    file = write_json(SAMPLES[name])
    (build,) = recognise(str(file)).values()
    reader = build(randomise_sides=False)
    assert (type(reader), reader.source, reader.layout) == (EditPairReader, name, LAYOUTS[name])
    assert [told(reader[row]) for row in range(len(reader))] == EXPECTED[name]
    sources = ["images/src.jpg", "images/c.jpg"] if name == "mmrb2" else ["images/src.jpg"]
    for prompt in reader.prompts():
        assert str(prompt) == "make it red"
        assert [source.image_key for source in sources_of(prompt)] == sources
    assert reader.prompts() == [reader[row].prompt for row in range(len(reader))]
    assert PairDataset(pickle.loads(pickle.dumps(reader)), PixelLoader(8, 8))[0].sources[0].shape == (3, 8, 8)
    lines = EditPairReader(str(write_json(SAMPLES[name], ".jsonl")), layout=name, randomise_sides=False)
    assert [told(lines[row])[:3] for row in range(len(lines))] == [row[:3] for row in EXPECTED[name]]
    plain = EditPairReader(str(file), sources="ignore")
    assert {type(prompt) for prompt in plain.prompts()} == {str}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_layout_hold_the_images(write_table, pictures, name) -> None:
    file = write_table(SAMPLES[name])
    (build,) = recognise(str(file)).values()
    reader = build(randomise_sides=False)
    pairs = [reader[row] for row in range(len(reader))]
    expected = [(label, models, group) for label, _, models, group in EXPECTED[name]]
    assert [(pair.label_a, (pair.model_a, pair.model_b), pair.group_id) for pair in pairs] == expected
    sources = [pictures["src"], pictures["c"]] if name == "mmrb2" else [pictures["src"]]
    for pair in pairs:
        assert (pair.image_a.data, pair.image_b.data) == (pictures["a"], pictures["b"])
        assert [source.data for source in sources_of(pair.prompt)] == sources
    assert named(reader.prompts()) == named(pair.prompt for pair in pairs)
    assert PairDataset(pickle.loads(pickle.dumps(reader)), PixelLoader(8, 8))[0].sources[0].shape == (3, 8, 8)
    assert {type(prompt) for prompt in EditPairReader(str(file), sources="ignore").prompts()} == {str}


def test_axes_are_labels_or_targets(write_json, tmp_path) -> None:
    rows = [{**SAMPLES["editreward_data"][0], "prompt": f"{n}"} for n in range(20)]
    rows[3] |= {"model1_dim1_score": 3, "model2_dim1_score": 3.0}
    rows[4] |= {"model2_dim2_score": None}
    file = str(write_json(rows))
    labels = {
        axis: EditPairReader(file, axis=axis, randomise_sides=False).labels()
        for axis in ("overall", "instruction_following", "visual_quality")
    }
    assert labels["overall"].tolist() == [1.0] * 20
    assert labels["instruction_following"].tolist() == [1.0] * 3 + [0.5] + [1.0] * 16
    quality = labels["visual_quality"].tolist()
    assert quality[:4] == [0.0] * 4 and quality[4] != quality[4] and quality[5:] == [0.0] * 15
    reader = EditPairReader(file)
    assert 3 < reader.labels().sum() < 17  # the better one is not always first
    assert [reader[row].label_a for row in range(20)] == reader.labels().tolist()
    facts = reader.facts()
    names = [name for name in facts if name.rpartition("_")[0] in ("instruction_following", "visual_quality")]
    columns = {name: pa.array(facts[name], pa.float64()) for name in names}
    pq.write_table(pa.table({"pair_id": reader.pair_ids(), **columns}), tmp_path / "axes.parquet")
    axes = ["instruction_following", "visual_quality"]
    targets = ScoreTargets({"train": str(tmp_path / "axes.parquet")}, axes, standardise=False).values("train", reader)
    assert targets is not None
    values = targets[:, :, 0]
    for row in range(20):
        better, other = values[row] if reader.labels()[row] else values[row].flip(0)
        assert (better[0] >= other[0]) and (row == 4 or better[1] < other[1])
    assert torch.isnan(values[4]).sum() == 1


def test_a_mark_of_ties_is_known_or_the_row_is_bad(write_json) -> None:
    for values, label in (((True, 1, 1.0, " Yes"), 0.5), ((False, None, 0, 0.0, "", "no", "None"), 1.0)):
        reader = EditPairReader(str(write_json([{**TRAIN, "tie_case": one} for one in values])), randomise_sides=False)
        assert reader.labels().tolist() == [label] * len(values)
    odd = [{**TRAIN, "tie_case": one} for one in (math.nan, "n", "N/A", 2, -1, "dim1 > dim2", [], {})]
    file = str(write_json([{**TRAIN, "tie_case": False}, *odd]))
    with pytest.raises(InputError, match=r"train\.json:1: tie_case is nan, no verdict"):
        EditPairReader(file)
    assert EditPairReader(file, on_error="skip").skipped.total() == len(odd)
