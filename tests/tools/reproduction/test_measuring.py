"""Values of each pair from tables of scores, whatever order a reader gives its images in."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tools.reproduction.measuring import PREDICTED, SCORED, measure
from tools.reproduction.rows import Metric

UTILITIES = {"p0": (3.0, 1.0), "p1": (1.0, 2.0), "p2": (2.0, 1.9), "p3": (0.0, 5.0)}
"""Of p2 they differ too little to count."""
SCORES = {"p0": (0.9, 0.1), "p1": (0.2, 0.4), "p2": (0.0, 1.0), "p3": (0.5, 0.3)}
"""Only p3 is ranked wrongly."""


@pytest.mark.parametrize("turned", [(), ("p1",), ("p0", "p1", "p2", "p3")])
def test_a_pair_counts_alike_in_either_order_of_its_images(turned: tuple[str, ...], tmp_path: Path) -> None:
    truth = [
        {"pair_id": name, "key_a": f"{name}-a", "key_b": f"{name}-b", "utility_a": first, "utility_b": second}
        for name, (first, second) in UTILITIES.items()
    ]
    parquet.write_table(pa.Table.from_pylist(truth), tmp_path / "oracle.parquet")
    scored, predicted = [], []
    for name, scores in SCORES.items():
        order = "ba" if name in turned else "ab"
        keys, values = [f"{name}-{side}" for side in order], [scores["ab".index(side)] for side in order]
        scored.append({"pair_id": name, "image_a": keys[0], "image_b": keys[1], "s_a": values[0], "s_b": values[1]})
        predicted.append({"pair_id": name, "chosen_key": keys[0], "sigma": 0.2, "margin": values[0] - values[1]})
    parquet.write_table(pa.Table.from_pylist(scored), tmp_path / SCORED)
    parquet.write_table(pa.Table.from_pylist(predicted), tmp_path / PREDICTED)
    for metric in (Metric("scores", "accuracy", column=("s",)), Metric("scores", "accuracy", sigma=(0.2,))):
        assert measure(metric, tmp_path, tmp_path).values.tolist() == [1.0, 1.0, 0.0]
