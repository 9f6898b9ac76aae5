"""Results of a benchmark as dataclasses, from which JSON, Markdown and HTML reports are written."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from latentreward.metrics.bootstrap import Interval, group_codes


@dataclass(frozen=True)
class BenchmarkPairs:
    """Pairs of one split with the scores of one scorer.

    Attributes:
        scorer: Name of the scorer.
        pair_ids: N unique names of the pairs.
        prompts: N raw prompts.
        groups: N names of prompt groups; pairs of one group are resampled together.
        labels: ``(N,)`` probability that image a is preferred; NaN without a label.
        first: ``(N,)`` scores of image a; NaN if the image could not be read.
        second: ``(N,)`` scores of image b; NaN if the image could not be read.
        columns: Further facts about each pair: name → N values, None where unknown. In columns of sub-groups, a value
            of several lines puts the pair into one sub-group per line. ``problem`` says why a score is NaN; ``vote``
            and ``label_0`` are published values that some protocols read.
        first_images: N keys of the images a, by which recurring images are recognised; may be empty.
        second_images: N keys of the images b; may be empty.
        split: Name of the split.
        temperature: Temperature of the scorer's win probability σ(gap / temperature) in PickScore's protocol, the only
            protocol that reads it; None has the protocol fit it.
    """

    scorer: str
    pair_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    first: np.ndarray
    second: np.ndarray
    columns: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    first_images: tuple[str, ...] = ()
    second_images: tuple[str, ...] = ()
    split: str = ""
    temperature: float | None = 1.0

    @cached_property
    def group_codes(self) -> np.ndarray:
        """``(N,)`` int64 index of each pair's group among the sorted names of groups."""
        return group_codes(self.groups)


@dataclass(frozen=True)
class ProtocolResult:
    """Result of one scorer by one protocol.

    Attributes:
        protocol: Key of the protocol, e.g. ``imagereward/micro``.
        scorer: Name of the scorer.
        estimate: The protocol's number, in [0, 1], with its interval.
        pairs: Number of pairs that count.
        groups: Number of prompt groups that count.
        equal_scores: Number of pairs that count and have two equal scores.
        excluded: Reason → number of pairs left out (ties, no label, an image that could not be read).
        details: Further results of the protocol, e.g. the threshold that PickScore's protocol fits.
        split: Name of the split.
        benchmark: Data set and split, e.g. ``hpdv3 test``.
    """

    protocol: str
    scorer: str
    estimate: Interval
    pairs: int
    groups: int
    equal_scores: int
    excluded: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    split: str = ""
    benchmark: str = ""


@dataclass(frozen=True)
class AverageResult:
    """Mean accuracy of one scorer over the benchmarks of :mod:`~latentreward.evaluation.benchmark.four_benchmarks`."""

    scorer: str
    estimate: Interval


@dataclass(frozen=True)
class SubgroupResult:
    """A protocol's number on one sub-group of the pairs.

    Attributes:
        protocol: Key of the protocol.
        scorer: Name of the scorer.
        column: Column that defines the sub-groups, e.g. ``models`` or ``prompt length``.
        value: Value of the column in this sub-group, e.g. ``flux against sdxl``.
        pairs: Number of pairs that count.
        estimate: The protocol's number on these pairs, with its interval.
        split: Name of the split.
        benchmark: Data set and split, e.g. ``hpdv3 test``.
    """

    protocol: str
    scorer: str
    column: str
    value: str
    pairs: int
    estimate: Interval
    split: str = ""
    benchmark: str = ""


@dataclass(frozen=True)
class DifferenceResult:
    """Difference of two scorers by one protocol, on the pairs that count for both scorers.

    Attributes:
        protocol: Key of the protocol.
        first: Name of the first scorer.
        second: Name of the second scorer.
        pairs: Number of pairs that count for both scorers.
        estimate: Number of the first scorer minus that of the second, with the interval of the paired difference.
        split: Name of the split.
        benchmark: Data set and split, e.g. ``hpdv3 test``.
    """

    protocol: str
    first: str
    second: str
    pairs: int
    estimate: Interval
    split: str = ""
    benchmark: str = ""


@dataclass(frozen=True)
class LevelResult:
    """Accuracy of a latent reward at one noise level.

    ``sigma`` is the noise level in [0, 1], ``timestep`` the timestep of the model's noise process at that level, and
    ``benchmark`` the name of data set and split.
    """

    protocol: str
    scorer: str
    sigma: float
    timestep: float
    estimate: Interval
    benchmark: str = ""


@dataclass(frozen=True)
class CalibrationResult:
    """Calibration of a scorer's win probabilities σ(gap / temperature): whether 0.7 wins seven times in ten.

    Attributes:
        protocol: Key of the protocol under which the result is reported.
        scorer: Name of the scorer.
        temperature: Maximum-likelihood temperature on all pairs; inf if larger gaps do not win more often.
        error: Expected calibration error in [0, 1], with temperatures fitted on other prompt groups.
        curve: (number of pairs, mean confidence, mean outcome) of each bin that holds pairs.
        benchmark: Data set and split, e.g. ``hpdv3 test``.
    """

    protocol: str
    scorer: str
    temperature: float
    error: Interval
    curve: tuple[tuple[int, float, float], ...]
    benchmark: str = ""


@dataclass(frozen=True)
class AgreementResult:
    """Agreement of two scorers on the same pairs; labels are not used.

    Attributes:
        benchmark: Data set and split.
        first: Name of the first scorer.
        second: Name of the second scorer.
        pairs: Number of pairs that both scorers scored.
        pair: Share of pairs on which the two score gaps have the same sign.
        spearman: Rank correlation of the scores of all images.
        pearson: Linear correlation of the scores of all images.
    """

    benchmark: str
    first: str
    second: str
    pairs: int
    pair: Interval
    spearman: Interval
    pearson: Interval


@dataclass(frozen=True)
class CorrelationResult:
    """Agreement of a reward with a CLIP or aesthetic scorer (CLIP-Corr, Aes-Corr).

    Attributes:
        benchmark: Data set and split.
        name: ``clip_corr_`` or ``aes_corr_`` followed by ``pearson``, ``spearman`` or ``pair``, as in
            :class:`AgreementResult`.
        scorer: Name of the reward.
        reference: Name of the CLIP or aesthetic scorer.
        estimate: Correlation or share of pairs, with its interval.
    """

    benchmark: str
    name: str
    scorer: str
    reference: str
    estimate: Interval


@dataclass(frozen=True)
class PublishedNumber:
    """Accuracy published by others, shown beside ours.

    Attributes:
        protocol: Key of the protocol that the accuracy is comparable with.
        model: Name of the model.
        value: Accuracy in [0, 1].
        source: Publication, and who measured the number.
    """

    protocol: str
    model: str
    value: float
    source: str


@dataclass(frozen=True)
class Disagreement:
    """Pair on which scorers disagree most; with one scorer, a pair on which it errs most.

    Attributes:
        benchmark: Data set and split.
        row: Row of the pair in the reader.
        pair_id: Name of the pair.
        prompt: Raw prompt.
        label: Probability that image a is preferred; None without a label.
        scores: Scorer → scores of image a and b.
        gaps: Scorer → score of a minus that of b, in units of the scorer's root mean square gap over the split.
    """

    benchmark: str
    row: int
    pair_id: str
    prompt: str
    label: float | None
    scores: dict[str, tuple[float, float]]
    gaps: dict[str, float]


@dataclass(frozen=True)
class BenchmarkReport:
    """Results of one run of ``latentreward benchmark``."""

    scorers: dict[str, str]
    """Name of a scorer → its identity, in one line."""
    protocols: tuple[ProtocolResult, ...] = ()
    averages: tuple[AverageResult, ...] = ()
    differences: tuple[DifferenceResult, ...] = ()
    subgroups: tuple[SubgroupResult, ...] = ()
    levels: tuple[LevelResult, ...] = ()
    calibration: tuple[CalibrationResult, ...] = ()
    agreement: tuple[AgreementResult, ...] = ()
    correlations: tuple[CorrelationResult, ...] = ()
    published: tuple[PublishedNumber, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    """Data set and split → counts from :func:`~latentreward.evaluation.benchmark.scoring.data_counts`."""
    telling: tuple[Disagreement, ...] = ()
    """Pairs on which scorers disagree most."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run, and versions of the packages that computed it."""
    notes: tuple[str, ...] = ()
    """Remarks shown before all numbers, e.g. that only the first pairs were scored."""
