"""Scored pairs of a benchmark, and the results from which JSON, Markdown and HTML reports are written."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from latentreward.core.bootstrap import group_codes
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
    for table in yaml.safe_load(Path(__file__).with_name("published_numbers.yaml").read_text(encoding="utf-8"))
    for column, (protocol, source) in enumerate(table["columns"].items())
    for model, cells in table["models"].items()
    if cells[column] is not None
)
"""Rows with an accuracy ``value`` in [0, 1], the key of the ``protocol`` that it is comparable with, the name of the
``model``, and the ``source``: publication, and who measured it."""


def published_for(protocols: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the published numbers of the given protocols, in the order of the protocols."""
    return tuple(number for key in protocols for number in PUBLISHED if number["protocol"] == key)


@dataclass(frozen=True)
class BenchmarkPairs:
    """Pairs of one split with the scores of one scorer."""

    scorer: str  # name of the scorer
    pair_ids: tuple[str, ...]  # N unique names of the pairs
    prompts: tuple[str, ...]  # N raw prompts
    groups: tuple[str, ...]  # N names of prompt groups; pairs of one group are resampled together
    labels: np.ndarray  # ``(N,)`` probability that image a is preferred; NaN without a label
    first: np.ndarray  # ``(N,)`` scores of image a; NaN if the image could not be read
    second: np.ndarray  # ``(N,)`` scores of image b; NaN if the image could not be read
    # Further facts about each pair: name → N values, None where unknown. In columns of sub-groups, a value of several
    # lines puts the pair into one sub-group per line. ``problem`` says why a score is NaN; ``vote`` and ``label_0`` are
    # published values that some protocols read.
    columns: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    first_images: tuple[str, ...] = ()  # N keys of the images a, by which recurring images are recognised; may be empty
    second_images: tuple[str, ...] = ()  # N keys of the images b; may be empty
    benchmark: str = ""  # data set and split in reports, e.g. ``hpdv3 test``
    split: str = ""  # name of the split
    # Temperature of the scorer's win probability σ(gap / temperature) in PickScore's protocol, the only protocol that
    # reads it; None has the protocol fit it
    temperature: float | None = 1.0

    @property
    def gap(self) -> np.ndarray:
        """``(N,)`` score of image a minus that of image b."""
        return self.first - self.second

    @cached_property
    def group_codes(self) -> np.ndarray:
        """``(N,)`` int64 index of each pair's group among the sorted names of groups."""
        return group_codes(self.groups)


@dataclass
class BenchmarkReport:
    """Results of one run of ``latentreward benchmark``, as lists of rows: name → value.

    In every row ``benchmark`` names data set and split, e.g. ``hpdv3 test``; ``protocol`` is a key of
    :data:`~latentreward.apps.evaluation.benchmark.protocols.PROTOCOLS`; ``scorer``, ``first`` and ``second`` are names
    of scorers; ``pairs`` is the number of pairs that count, and ``estimate`` the protocol's number in [0, 1] on these
    pairs with its :class:`~latentreward.core.bootstrap.Interval`.
    """

    scorers: dict[str, str]  # name of a scorer → its identity, in one line
    # Result of each scorer by each protocol. ``groups``: number of prompt groups that count. ``equal_scores``: number
    # of pairs that count and have two equal scores. ``excluded``: reason → number of pairs left out (ties, no label, an
    # image that could not be read). ``details``: further results of the protocol, e.g. the threshold that PickScore's
    # protocol fits.
    protocols: list[Row] = field(default_factory=list)
    # Mean accuracy of a scorer over the benchmarks of
    # :data:`~latentreward.apps.evaluation.benchmark.results.FOUR_BENCHMARKS`
    averages: list[Row] = field(default_factory=list)
    # ``estimate`` of the first scorer minus that of the second, on the pairs that count for both, with the interval of
    # the paired difference
    differences: list[Row] = field(default_factory=list)
    # A protocol's number on the pairs with one ``value`` of a ``column``, e.g. ``flux against sdxl`` of ``models``
    subgroups: list[Row] = field(default_factory=list)
    # Accuracy of a latent reward at one noise level: ``sigma`` in [0, 1], ``timestep`` of the model's noise process
    levels: list[Row] = field(default_factory=list)
    # Calibration of win probabilities σ(gap / temperature): whether 0.7 wins seven times in ten. ``temperature``:
    # maximum-likelihood temperature on all pairs, inf if larger gaps do not win more often. ``error``: expected
    # calibration error in [0, 1], with temperatures fitted on other prompt groups. ``curve``: (number of pairs, mean
    # confidence, mean outcome) of each bin that holds pairs.
    calibration: list[Row] = field(default_factory=list)
    # Agreement of two scorers on the pairs that both scored, without labels. ``pair``: share of pairs on which the two
    # score gaps have the same sign. ``spearman``, ``pearson``: rank and linear correlation of the scores of all images.
    agreement: list[Row] = field(default_factory=list)
    # Agreement of a reward with a ``reference``, a CLIP or aesthetic scorer. ``name``: ``clip_corr_`` or ``aes_corr_``
    # followed by ``pearson``, ``spearman`` or ``pair``, as in ``agreement``.
    correlations: list[Row] = field(default_factory=list)
    # Accuracies published by others, rows of
    # :data:`~latentreward.apps.evaluation.benchmark.results.PUBLISHED`
    published: list[Row] = field(default_factory=list)
    # Data set and split → counts from :func:`~latentreward.apps.evaluation.benchmark.pair_scores.data_counts`
    data: dict[str, Any] = field(default_factory=dict)
    # Pairs on which scorers disagree most; with one scorer, pairs on which it errs most. ``row``: row of the pair in
    # the reader. ``label``: probability that image a is preferred; None without a label. ``scores``: scorer → scores of
    # image a and b. ``gaps``: scorer → score of a minus that of b, in units of the scorer's root mean square gap over
    # the split.
    telling: list[Row] = field(default_factory=list)
    # Settings of the run, and versions of the packages that computed it
    settings: dict[str, Any] = field(default_factory=dict)
    # Remarks shown before all numbers, e.g. that only the first pairs were scored
    notes: list[str] = field(default_factory=list)
