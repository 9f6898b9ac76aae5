"""Score tables, the filter on their gaps, and the reader that is left."""

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import (
    MPCF,
    FilteredReader,
    HPDv3Reader,
    PairGaps,
    PairReader,
    PickAPicReader,
    ScoreTable,
    select_consistent,
)

COMMITTED = Path(__file__).parents[1] / "formats" / "data"
SAMPLES = Path(os.environ.get("LATENTREWARD_SAMPLES_DIR", COMMITTED))
HEADER = "different_flag,aesthetic_gap,clipscore_gap,vqascore_gap"
NAN = math.nan


def gaps(*rows: tuple[float, float, float, float]) -> PairGaps:
    flag, aesthetic, clip, vqa = np.array(rows, dtype=np.float64).T
    return PairGaps(flag == 1, {"aesthetic": aesthetic, "clipscore": clip, "vqascore": vqa})


class Labelled(PairReader):
    """Reader of rows with the given labels."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__()
        self.given = labels

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> PreferencePair:
        return PreferencePair(str(index), "", ImageRef("a"), ImageRef("b"), self.given[index])


def write_csv(path: Path, *lines: str, header: str = HEADER) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_sample_table(strategy: int) -> None:
    expected = json.loads((SAMPLES / "EXPECTED.json").read_text())["lrm_mpcf"]
    file = SAMPLES / "lrm_mpcf" / "pseudo_preference.csv"
    table, flags = ScoreTable(file), np.genfromtxt(file, delimiter=",", names=True)["different_flag"]
    keep, dropped = select_consistent(table.gaps(Labelled(np.where(flags == 1, 1.0, 0.5))), MPCF(strategy))
    assert np.flatnonzero(keep).tolist() == sorted(expected[f"strategy_{strategy}_kept_rows"])
    assert keep.sum() + dropped.total() == len(table)


@pytest.mark.parametrize(("strategy", "kept"), [(1, [0, 2]), (2, [0, 1, 2, 5]), (3, [0, 1, 2, 3, 5])])
def test_sample_rows_of_pickapic(strategy: int, kept: list[int]) -> None:
    everything = PickAPicReader(str(COMMITTED / "pickapic_v1"), "train", on_error="placeholder")
    table = COMMITTED / "lrm_mpcf" / "pseudo_preference.csv"
    reader = FilteredReader(everything, table, strategy=strategy)
    assert reader.pair_ids() == [everything[row].pair_id for row in kept]
    assert [pair.prompt for pair in reader] == reader.prompts() == [everything.prompts()[row] for row in kept]
    assert [pair.label_a for pair in reader] == reader.labels().tolist()
    assert len(reader) + reader.skipped.total() == len(everything)


@pytest.mark.parametrize(
    ("row", "code", "paper"),
    [
        ((1, -0.5, 0.1, 0.1), False, True),
        ((1, 0.1, 0.0, 0.1), False, True),
        ((1, 0.1, 0.1, 0.0), False, True),
        ((1, -0.49, 1e-9, 1e-9), True, True),
        ((1, -0.51, 1.0, 1.0), False, False),
        ((0, 0.19, 0.029, 0.069), True, True),
        ((0, 0.2, 0.0, 0.0), False, False),
        ((0, 0.0, 0.03, 0.0), False, False),
        ((0, 0.0, 0.0, 0.07), False, False),
        ((0, -9.0, -9.0, -9.0), True, True),
        ((1, NAN, 1.0, 1.0), False, False),
        ((0, 0.0, 0.0, NAN), False, False),
        ((1, math.inf, math.inf, math.inf), True, True),
    ],
)
def test_boundaries_of_strategy_2(row: tuple[float, ...], code: bool, paper: bool) -> None:
    assert select_consistent(gaps(row), MPCF(2, "code"))[0].tolist() == [code]
    assert select_consistent(gaps(row), MPCF(2, "paper"))[0].tolist() == [paper]


@pytest.mark.parametrize(("ties", "kept"), [("limits", [0, 1]), ("drop", [0]), ("keep", [0, 1, 2])])
def test_ties(ties: str, kept: list[int]) -> None:
    rows = gaps((1, 1, 1, 1), (0, 0.1, 0, 0), (0, 0.5, 0, 0), (0, NAN, 0, 0))
    keep, dropped = select_consistent(rows, MPCF(ties=ties))
    assert np.flatnonzero(keep).tolist() == kept
    assert dropped["aesthetic missing or NaN"] == 1
    assert keep.sum() + dropped.total() == 4


def test_each_dropped_row_counts_once_under_its_first_reason() -> None:
    rows = gaps((1, -1, -1, -1), (1, 1, -1, -1), (1, 1, 1, -1), (1, NAN, -1, NAN), (0, 1, 1, 1))
    keep, dropped = select_consistent(rows, MPCF())
    assert not keep.any()
    assert dropped == {
        "aesthetic gap too low": 1,
        "clipscore gap too low": 1,
        "vqascore gap too low": 1,
        "aesthetic missing or NaN": 1,
        "aesthetic gap of a tie too large": 1,
    }


def test_which_scorers_apply_is_a_setting() -> None:
    rows = PairGaps(np.array([True, True, False]), {"pickscore": np.array([0.2, -0.2, 0.0])})
    rule = MPCF(floors={"pickscore": -0.1}, tie_limits={"pickscore": 0.5})
    assert select_consistent(rows, rule)[0].tolist() == [True, False, True]
    clip_only = MPCF(floors={"clipscore": 0.0})
    assert clip_only.limits_in_use() == {"clipscore": 0.03}


def test_rows_without_scores(tmp_path: Path, write_pickapic, pickapic_rows) -> None:
    """NaN and empty gaps, another flag, and a row that the reader has no label for."""
    rows = [pickapic_rows(number) for number in range(7)]
    rows[5] |= {"label_0": 1.0, "label_1": 1.0}
    rows[6] |= {"label_0": 0.5, "label_1": 0.5}
    lines = ["1,1,1,1", "1,NaN,1,1", "1,1,,1", "0,0,0,0", ",1,1,1", "1,1,1,1", "0,0,0,0"]
    reader = PickAPicReader(write_pickapic(rows), "train", on_error="placeholder")
    filtered = FilteredReader(reader, write_csv(tmp_path / "scores.csv", *lines))
    assert filtered.rows.tolist() == [0, 6]
    assert filtered.labelled().all()
    assert filtered.skipped == {
        "aesthetic missing or NaN": 1,
        "clipscore missing or NaN": 1,
        "different_flag contradicts the label": 2,
        "unlabelled": 1,
    }


def test_a_missing_row_of_an_aligned_table(tmp_path: Path, write_pickapic, pickapic_rows) -> None:
    rows = [pickapic_rows(number) for number in range(4)]
    rows[2]["are_different"] = False
    source, scores = write_pickapic(rows), write_csv(tmp_path / "scores.csv", *["1,1,1,1"] * 4)
    assert len(FilteredReader(PickAPicReader(source, "train"), scores)) == 4
    with pytest.raises(InputError, match="4 rows for 3 of the reader, which left out 1 identical images") as error:
        FilteredReader(PickAPicReader(source, "train", drop_identical=True), scores)
    assert "\n" not in str(error.value)


def test_rows_by_pair_id(tmp_path: Path, write_hpdv3, hpdv3_rows) -> None:
    reader = HPDv3Reader(write_hpdv3([hpdv3_rows(number) for number in range(5)]), "train")
    lines = ["train.json:4,1,0.1,0.1,0.1", "train.json:0,1,-2,0.1,0.1", "train.json:2,1,,0.1,0.1", "other:9,1,1,1,1"]
    scores = write_csv(tmp_path / "scores.csv", *lines, header=f"pair_id,{HEADER}")
    filtered = FilteredReader(reader, scores)
    assert filtered.pair_ids() == ["train.json:4"]
    assert filtered.skipped == {"not in the score table": 2, "aesthetic gap too low": 1, "aesthetic missing or NaN": 1}


@pytest.mark.parametrize("randomise_sides", [True, False])
def test_gaps_from_the_scores_of_both_images(tmp_path: Path, write_hpdv3, hpdv3_rows, randomise_sides: bool) -> None:
    reader = HPDv3Reader(
        write_hpdv3([hpdv3_rows(number) for number in range(12)]), "train", randomise_sides=randomise_sides
    )
    good = [pair.label_a == 1 for pair in reader]
    score = {"a": np.where(good, 3.0, 1.0), "b": np.where(good, 1.0, 3.0)}  # the preferred image is 2 better
    path = tmp_path / "scores.parquet"
    table = {"pair_id": reader.pair_ids(), "clip_a": score["a"], "clip_b": score["b"], "image_a": ["x"] * 12}
    pq.write_table(pa.table(table), path)
    assert ScoreTable(path).scorers == ("clip",)
    assert ScoreTable(path).gaps(reader).values["clip"].tolist() == [2.0] * 12
    assert len(FilteredReader(reader, path, floors={"clip": 1.9}, ties="drop")) == 12
    with pytest.raises(InputError, match=r"none of 12 rows left \(12 clip gap too low\)"):
        FilteredReader(reader, path, floors={"clip": 2.0}, ties="drop")


@pytest.mark.parametrize(
    ("named", "told"), [("own", None), ("exchanged", "which is image b of the reader"), ("others", "in the reader; m")]
)
def test_a_table_that_names_other_images_is_refused(
    tmp_path: Path, write_hpdv3, hpdv3_rows, named: str, told: str | None
) -> None:
    reader = HPDv3Reader(write_hpdv3([hpdv3_rows(number) for number in range(6)]), "train")
    keys = [(pair.image_a.image_key, pair.image_b.image_key) for pair in reader]
    keys = {"own": keys, "exchanged": [pair[::-1] for pair in keys], "others": keys[::-1]}[named]
    lines = [f"{first},{second},1,0,," for first, second in keys]  # in the reader's order, as score-pairs writes them
    path = write_csv(tmp_path / "scores.csv", *lines, header="image_a,image_b,clip_a,clip_b,problem_a,problem_b")
    assert ScoreTable(path).scorers == ("clip",)
    with nullcontext() if told is None else pytest.raises(InputError, match=told):
        assert len(FilteredReader(reader, path, floors={"clip": -2.0}, ties="keep")) == 6
    gaps = [f"{line.rstrip(',')},1" for line in lines]  # a gap has no sides
    path = write_csv(tmp_path / "gaps.csv", *gaps, header="image_a,image_b,clip_a,clip_b,clip_gap")
    with pytest.raises(InputError, match=told or "") if named == "others" else nullcontext():
        assert len(FilteredReader(reader, path, floors={"clip": 0.0}, ties="keep")) == 6


def test_gap_of_a_tie_is_absolute(tmp_path: Path, write_pickapic, pickapic_rows) -> None:
    tie = {"label_0": 0.5, "label_1": 0.5}
    rows = [pickapic_rows(0, **tie), pickapic_rows(1, **tie), pickapic_rows(2, label_0=None, label_1=None)]
    reader = PickAPicReader(write_pickapic(rows), "train")
    path = write_csv(tmp_path / "scores.csv", "1,3", "3,1", "1,3", header="clip_a,clip_b")
    np.testing.assert_array_equal(ScoreTable(path).gaps(reader).values["clip"], [2.0, 2.0, NAN])


def test_number_like_pair_ids_stay_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "scores.csv", "007,1,1,1,1", "7,1,1,1,1", header=f"pair_id,{HEADER}")
    assert len(ScoreTable(path)) == 2
