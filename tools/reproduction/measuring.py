"""Values of each held-out item from the tables that steps write, and their compact form in JSON."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import csv, parquet

from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from tools.reproduction.rows import Metric

LEAST_GAP = 0.3
"""Difference of utilities above which a pair counts as clearly different."""
SCALE = 1000
"""Values that are not 0 or 1 are kept as integers of a thousandth."""
DECIMALS = 4
"""Decimals of a mean."""
ITEMS = re.compile(r"[0-9a-f]+")
"""Digest of the items' names."""
PREDICTED, SCORED, PICTURES = "scores_rank0.parquet", "scores.parquet", "scores.csv"
"""Files that ``predict``, ``score-pairs`` and ``evaluate-policy`` write."""


@dataclass(frozen=True)
class Values:
    """Value of each of N items."""

    items: str  # digest of the items' names; two sets of values can be paired if their digests are equal
    values: np.ndarray  # ``(N,)`` float64

    def packed(self) -> dict[str, Any]:
        """Return the values as entries for JSON: bits if all are 0 or 1, else integers of 16 bits, in base 64.

        Raises:
            InputError: If there is no value, or one is NaN or does not fit.
        """
        if not len(self.values):
            raise InputError("no item has a value: give more pairs, some of which differ in what is measured")
        shape = {"items": self.items, "number": len(self.values), "mean": round(float(self.values.mean()), DECIMALS)}
        if np.isin(self.values, (0, 1)).all():
            return shape | {"bits": base64.b64encode(np.packbits(self.values.astype(bool))).decode()}
        thousandths = np.round(self.values * SCALE)
        if not (np.abs(thousandths) < 2**15).all():  # NaN is not
            raise InputError(f"values from {self.values.min():g} to {self.values.max():g}: give finite ones below 32.7")
        return shape | {"thousandths": base64.b64encode(thousandths.astype("<i2")).decode()}

    @classmethod
    def unpacked(cls, entries: Mapping[str, Any]) -> "Values":
        """Undo :meth:`packed`, up to rounding.

        Raises:
            ValueError: If an entry has another form, or the mean and the number are not those of the values.
        """
        number, mean = entries["number"], entries["mean"]
        if type(number) is not int or type(mean) is not float or not ITEMS.fullmatch(entries["items"]):
            raise ValueError(f"number, mean and items are {number!r}, {mean!r}, {entries['items']!r}")
        if "bits" in entries:
            packed = np.frombuffer(base64.b64decode(entries["bits"]), np.uint8)
            if not 0 <= 8 * len(packed) - number < 8:
                raise ValueError(f"{number} values in {len(packed)} bytes")
            values, rounded = np.unpackbits(packed, count=number).astype(np.float64), 0.0
        else:
            values, rounded = np.frombuffer(base64.b64decode(entries["thousandths"]), "<i2") / SCALE, 0.5 / SCALE
        if not len(values) == number > 0:
            raise ValueError(f"number is {number}, of {len(values)} values")
        if not abs(values.mean() - mean) < rounded + 10.0**-DECIMALS:  # NaN is not
            raise ValueError(f"mean is {mean}, that of the values {values.mean():.{DECIMALS}f}")
        return cls(entries["items"], values)


def measure(metric: Metric, scores: Path, pairs: Path | None) -> Values:
    """Compute a metric's value of each item.

    ``scores`` and ``pairs`` are the output folders of the steps that wrote them; ``pairs`` is None for pictures.
    """
    if pairs is None:
        return _pictures(metric, scores / PICTURES)
    (oracle,) = pairs.rglob("oracle.parquet")
    truth = {row["pair_id"]: row for row in parquet.read_table(oracle).to_pylist()}
    read = _scored if metric.column else _predicted
    margins = read(metric, scores / (SCORED if metric.column else PREDICTED), truth)
    if metric.kind == "turned":
        first = _predicted(metric, scores / PREDICTED, truth, first=True)
        return _named({name: float(margin * first[name] < 0) for name, margin in margins.items()})
    part = {"accuracy": "utility"}.get(metric.kind, metric.kind)
    gaps = {name: truth[name][f"{part}_a"] - truth[name][f"{part}_b"] for name in margins}
    least = LEAST_GAP if metric.kind == "accuracy" else 1e-9
    return _named({name: float(margins[name] * gap > 0) for name, gap in gaps.items() if abs(gap) > least})


def _named(values: Mapping[str, float]) -> Values:
    names = sorted(values)
    return Values(digest(["\n".join(names)], 4), np.array([values[name] for name in names]))


def _predicted(
    metric: Metric, path: Path, truth: Mapping[str, Mapping[str, Any]], first: bool = False
) -> dict[str, float]:
    """Read margins, first minus second image, of predicted pairs; summed over the levels nearest to the metric's.

    ``path`` is a table of ``predict``; the oracle's row in ``truth`` tells which image of a pair is the first.
    ``first`` reads the first level of the table instead.
    """
    rows = parquet.read_table(path).to_pylist()
    column = "timestep" if metric.timestep else "sigma"
    known = list(dict.fromkeys(row[column] for row in rows))
    levels = metric.timestep or metric.sigma
    wanted = known[:1] if first else [min(known, key=lambda one: abs(one - level)) for level in levels]
    sums = {row["pair_id"]: 0.0 for row in rows}
    for row in rows:
        if row[column] in wanted:
            sign = 1 if row["chosen_key"] == truth[row["pair_id"]]["key_a"] else -1
            sums[row["pair_id"]] += sign * row["margin"]
    return sums


def _scored(metric: Metric, path: Path, truth: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Read margins, first minus second image, of a table of ``score-pairs``; summed over the metric's columns.

    A reader may give a pair's images in another order than the oracle's row in ``truth``.
    """
    table = parquet.read_table(path)
    margins = sum(table[f"{name}_a"].to_numpy() - table[f"{name}_b"].to_numpy() for name in metric.column)
    names, keys = table["pair_id"].to_pylist(), table["image_a"].to_pylist()
    signs = [-1 if key == truth[name]["key_b"] else 1 for name, key in zip(names, keys, strict=True)]
    return dict(zip(names, (np.asarray(margins) * signs).tolist(), strict=True))


def _pictures(metric: Metric, path: Path) -> Values:
    table = csv.read_csv(path)
    places, images = table["place"].to_pylist(), table["image"].to_pylist()
    names = [f"{place}/{image}" for place, image in zip(places, images, strict=True)]
    values = np.mean([table[name].to_numpy() for name in metric.column], axis=0)
    return _named(dict(zip(names, values.tolist(), strict=True)))
