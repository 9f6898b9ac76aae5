"""Pairs of emoji are read as those of the data sets whose layouts they have, with the oracle's table beside them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from latentreward.data import HPDv3Reader, PickAPicReader
from tools.emoji.pairs import main
from tools.emoji.world import EmojiWorld


@pytest.mark.usefixtures("in_environment")
def test_held_out_labels_are_those_of_the_oracle(tmp_path: Path, world: EmojiWorld) -> None:
    main([str(tmp_path / "pairs"), "--train", "120", "--test", "40"])
    truth = {row["pair_id"]: row for row in pq.read_table(tmp_path / "pairs/oracle.parquet").to_pylist()}
    wrong = {}
    for split in ("train", "test"):
        reader = PickAPicReader(str(tmp_path / "pairs"), split, weight="equal")
        pairs = [reader[place] for place in range(len(reader))]
        assert {pair.prompt for pair in pairs} <= {*world.texts(split)}
        gaps = [truth[pair.pair_id]["utility_a"] - truth[pair.pair_id]["utility_b"] for pair in pairs]
        clear = [(pair.label_a, gap) for pair, gap in zip(pairs, gaps, strict=True) if abs(gap) >= 0.15]
        assert len(clear) > 0.7 * len(pairs)
        wrong[split] = sum((label == 1.0) != (gap > 0) for label, gap in clear)
    assert wrong["test"] == 0
    assert wrong["train"] > 0


@pytest.mark.usefixtures("in_environment")
def test_mixed_pairs_and_hpdv3(tmp_path: Path) -> None:
    main([str(tmp_path / "mixed"), "--mixed", "--train", "60"])
    rows = pq.read_table(tmp_path / "mixed/oracle.parquet").to_pylist()
    assert len(rows) == 60
    opposed = sum((row["quality_a"] - row["quality_b"]) * (row["alignment_a"] - row["alignment_b"]) < 0 for row in rows)
    assert opposed > 10
    main([str(tmp_path / "hpdv3"), "--layout", "hpdv3", "--train", "20", "--test", "10"])
    assert [len(HPDv3Reader(str(tmp_path / "hpdv3"), split)) for split in ("train", "test")] == [20, 10]
