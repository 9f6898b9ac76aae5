"""Pairs with mixed preferences: winners worse in one part, which the filter removes by the oracle's own table."""

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from latentreward.data import FilteredReader
from latentreward.tinyworld.captions import held_out_captions, parse_caption
from latentreward.tinyworld.judge import TinyWorldJudge
from latentreward.tinyworld.oracle import judge
from latentreward.tinyworld.reader import TinyWorldReader
from latentreward.tinyworld.scenes import draw_scene, render

PAIRS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "pairs"
    TinyWorldReader(str(folder), PAIRS, kind="mixed")
    return folder


def gaps(folder: Path, reader: FilteredReader | TinyWorldReader) -> dict[str, np.ndarray]:
    """Part of the utility -> winner minus loser of each pair of a reader."""
    rows = {row["pair_id"]: row for row in parquet.read_table(folder / "oracle.parquet").to_pylist()}
    signs = np.where(reader.labels() == 1.0, 1, -1)
    return {
        part: signs * [rows[name][f"{part}_a"] - rows[name][f"{part}_b"] for name in reader.pair_ids()]
        for part in ("utility", "alignment", "quality")
    }


def test_winners_are_worse_as_often_as_asked(folder: Path) -> None:
    found = gaps(folder, TinyWorldReader(str(folder), PAIRS, kind="mixed"))
    spread = 4 * 0.5 / PAIRS**0.5  # four standard errors of a share
    assert abs((found["quality"] < 0).mean() - 0.5) < spread
    assert abs((found["alignment"] < 0).mean() - 0.4) < spread
    np.testing.assert_allclose(found["utility"], 4 * found["alignment"] + 2 * found["quality"])
    assert abs(((found["quality"] < 0) & (found["alignment"] < 0)).mean() - 0.2) < spread


def test_the_oracle_filters_the_pairs(folder: Path) -> None:
    def kept(quality: float, comparison: str = "paper") -> FilteredReader:
        floors = {"quality": quality, "alignment": 0.0}
        reader = TinyWorldReader(str(folder), PAIRS, kind="mixed")
        return FilteredReader(reader, folder / "oracle.parquet", floors=floors, ties="drop", comparison=comparison)

    found = gaps(folder, kept(-0.42))
    assert min(found["alignment"]) >= 0
    assert -0.42 <= min(found["quality"]) < 0
    assert len(kept(0.0)) < len(kept(-0.42)) < len(kept(-0.79)) < PAIRS
    assert len(kept(-0.42, "code")) < len(kept(-0.42))


def test_the_judge_is_a_scorer() -> None:
    captions, rng = held_out_captions(3, 0), np.random.default_rng(0)
    pictures = [render(draw_scene(parse_caption(text), rng)) for text in captions]
    scores = TinyWorldJudge()(captions, pictures)
    assert TinyWorldJudge().columns == ("utility", "alignment", "all_right", "quality")
    verdict = judge(pictures[1], captions[1])
    assert scores[1].tolist() == pytest.approx(
        [verdict.utility, verdict.alignment, float(verdict.all_right), verdict.quality]
    )
