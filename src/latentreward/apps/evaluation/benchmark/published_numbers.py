"""Accuracies that others published, shown beside ours; each belongs to the protocol closest to the paper's.

The same model measured by two code bases differs by about a percentage point, because image sizes, precision and ties
are treated differently. Where a paper does not state its protocol, the source says so.
"""

from pathlib import Path

import yaml

from latentreward.core.reports.tables import Row

AVERAGE = "four_benchmarks"
"""Key of the mean accuracy over :data:`FOUR_BENCHMARKS`, in the place of a protocol's key."""
FOUR_BENCHMARKS = {
    "imagereward test": "imagereward/micro",
    "hpdv2 test": "hpdv2/micro",
    "hpdv3 test": "hpdv3",
    "genai_bench_tiger test": "genai_bench_tiger/no_tie",
}
"""Data set and split → key of the protocol whose accuracy is averaged."""
PUBLISHED: tuple[Row, ...] = tuple(
    {"protocol": protocol, "model": model, "value": round(cells[column] / 100, 6), "source": source}
    for table in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for column, (protocol, source) in enumerate(table["columns"].items())
    for model, cells in table["models"].items()
    if cells[column] is not None
)
"""Rows with an accuracy ``value`` in [0, 1], the key of the ``protocol`` that it is comparable with, the name of the
``model``, and the ``source``: publication, and who measured it."""


def published_for(protocols: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the published numbers of the given protocols, in the order of the protocols."""
    return tuple(number for key in protocols for number in PUBLISHED if number["protocol"] == key)
