"""What a benchmark finds, as plain values: what JSON, Markdown and HTML show alike."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from latentreward.metrics.bootstrap import Interval, group_codes


@dataclass(frozen=True)
class BenchmarkPairs:
    """Pairs of one split with the scores of one scorer, ready for any protocol.

    Attributes:
        scorer: Name of the scorer.
        pair_ids: N names.
        prompts: N raw prompts.
        groups: N names of the prompt group; pairs of one group are resampled together.
        labels: ``(N,)`` probability that image a is preferred; NaN without label.
        first: ``(N,)`` scores of image a; NaN where it could not be read.
        second: ``(N,)`` of image b.
        columns: More about each pair, for tables of sub-groups: name → N values, None where unknown; a value of
            several lines puts the pair into a sub-group for each line. ``problem`` says why a score is NaN,
            ``vote`` and ``label_0`` are as published where a protocol needs them so.
        first_images: N keys of the images a, by which images that recur are known; may be left empty.
        second_images: N keys of the images b.
        split: Name of the split.
        temperature: What the scorer's win probability σ(gap / temperature) takes; None has it fitted. Only PickScore's
            protocol and calibration curves depend on it.
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
        """``(N,)`` int64: the place of each pair's group among the sorted names."""
        return group_codes(self.groups)


@dataclass(frozen=True)
class ProtocolResult:
    """One scorer by one protocol.

    Attributes:
        protocol: Key, e.g. ``imagereward/micro``.
        scorer: Name of the scorer.
        estimate: The protocol's number, in [0, 1].
        pairs: Pairs that count.
        groups: Prompt groups that count.
        equal_scores: Pairs among them whose two scores are equal.
        excluded: Reason → pairs left out (ties, no label, an image that could not be read).
        details: What else the protocol tells, e.g. the threshold that PickScore's fits.
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
    """One scorer's mean of the four benchmarks of :mod:`~latentreward.evaluation.benchmark.four_benchmarks`."""

    scorer: str
    estimate: Interval


@dataclass(frozen=True)
class SubgroupResult:
    """A protocol's number over some of its pairs.

    Attributes:
        protocol: Key.
        scorer: Name of the scorer.
        column: What the pairs are told apart by, e.g. ``models`` or ``prompt length``.
        value: Which of them, e.g. ``flux against sdxl``.
        pairs: How many.
        estimate: The number.
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
    """One scorer against another by one protocol, on the pairs that count for both.

    Attributes:
        protocol: Key.
        first: Name of one scorer.
        second: Name of the other.
        pairs: Pairs that count for both.
        estimate: Number of the first minus number of the second, with the interval of the paired difference.
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
    """Accuracy of a latent reward at one noise level; ``sigma`` in [0, 1], ``benchmark`` the data set and split."""

    protocol: str
    scorer: str
    sigma: float
    timestep: float
    estimate: Interval
    benchmark: str = ""


@dataclass(frozen=True)
class CalibrationResult:
    """Whether a predicted win probability of 0.7 wins seven times in ten.

    Attributes:
        protocol: Key of the protocol whose pairs are used.
        scorer: Name of the scorer.
        temperature: Fitted on all pairs, so that σ(gap / temperature) is likeliest; inf if larger gaps do not win.
        error: Expected calibration error in [0, 1], out of sample (cross-fitted temperature).
        curve: (pairs, mean confidence, mean outcome) of each bin that holds pairs.
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
    """Two scorers on the same pairs: share with the same sign of gap, and correlations of their scores.

    Attributes:
        benchmark: Data set.
        first: Name of one scorer.
        second: Name of the other.
        pairs: Pairs both scored.
        pair: Share of pairs where the signs of the gaps agree.
        spearman: Rank correlation of the scores of all images.
        pearson: Linear correlation likewise.
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
    """Agreement of a reward with a CLIP or aesthetic score, under a name that says how it was computed.

    Attributes:
        benchmark: Data set and split.
        name: ``clip_corr_`` or ``aes_corr_``, and ``pearson``, ``spearman`` or ``pair``.
        scorer: Name of the reward.
        reference: Name of the CLIP or aesthetic scorer.
        estimate: The number.
    """

    benchmark: str
    name: str
    scorer: str
    reference: str
    estimate: Interval


@dataclass(frozen=True)
class PublishedNumber:
    """A number from elsewhere, to stand beside ours.

    Attributes:
        protocol: Key of the protocol it is comparable with.
        model: Name of the model.
        value: In [0, 1].
        source: Where it was published, and by whom it was measured.
    """

    protocol: str
    model: str
    value: float
    source: str


@dataclass(frozen=True)
class Disagreement:
    """A pair on which scorers differ most, or on which the only one is most surely wrong.

    Attributes:
        benchmark: Data set and split.
        row: Row of its reader.
        pair_id: Its name.
        prompt: Raw text.
        label: Probability that image a is preferred; None without label.
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
    """All of one run of ``latentreward benchmark``."""

    scorers: dict[str, str]
    """Name → identity, in one line."""
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
    """Data set → rows, pairs, images, missing and unreadable images by reason."""
    telling: tuple[Disagreement, ...] = ()
    """Pairs on which scorers disagree most."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, with versions of what computed it."""
    notes: tuple[str, ...] = ()
    """What a reader must know before all numbers, e.g. that only the first pairs were scored."""
