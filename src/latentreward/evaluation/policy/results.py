"""What an evaluation of generators finds, as plain values: what JSON, Markdown and HTML show alike."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentreward.metrics.bootstrap import Interval
from latentreward.scorers.tools import JudgedPicture


@dataclass(frozen=True)
class ScoredPictures:
    """Pictures of one policy with all scores.

    Attributes:
        policy: Name of the policy.
        pictures: N pictures, by place and number.
        scores: Name of a score → ``(N,)`` float64.
    """

    policy: str
    pictures: tuple[JudgedPicture, ...]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class GroupMean:
    """A score over the prompts of one group.

    Attributes:
        group: Which.
        prompts: How many.
        estimate: Mean.
        parts_sd: Standard deviation of the means of successive parts of the group; NaN with one part.
    """

    group: str
    prompts: int
    estimate: Interval
    parts_sd: float


@dataclass(frozen=True)
class PolicyScore:
    """One score of one policy.

    Attributes:
        policy: Name of the policy.
        score: Name of the score.
        headline: ``mean`` or ``mean_of_groups``: which of the two is the number of the score's own protocol.
        mean: Over all pictures, with an interval over prompts.
        mean_of_groups: Mean of the groups' means; None with one group.
        groups: Each group by itself; none with one group.
        pictures: How many.
        prompts: How many.
    """

    policy: str
    score: str
    headline: str
    mean: Interval
    mean_of_groups: Interval | None
    groups: tuple[GroupMean, ...]
    pictures: int
    prompts: int

    @property
    def estimate(self) -> Interval:
        """The number of the score's own protocol."""
        return self.mean_of_groups if self.headline == "mean_of_groups" and self.mean_of_groups else self.mean


@dataclass(frozen=True)
class Comparison:
    """Two policies by one score, picture by picture.

    Attributes:
        score: Name of the score.
        group: Over which prompts; empty for all.
        win_rate: Share of pictures of the first policy with the higher score, ties counting ½.
        difference: Mean of first minus second.
        wins: Pictures where the first is higher.
        ties: Pictures where both are equal.
        losses: Pictures where the second is higher.
        prompts: How many.
    """

    score: str
    group: str
    win_rate: Interval
    difference: Interval
    wins: int
    ties: int
    losses: int
    prompts: int


@dataclass(frozen=True)
class PublishedScore:
    """A number from elsewhere, to stand beside ours."""

    model: str
    score: str
    value: float
    source: str


@dataclass(frozen=True)
class PolicyReport:
    """All of one run of ``latentreward evaluate-policy``.

    Attributes:
        policies: Name → what it is, in one line.
        scorers: Name → identity, in one line.
        scores: All scores of all policies.
        comparisons: Between the two policies; none with one.
        published: Numbers of the protocol's authors.
        settings: Of the run, with versions of what computed it.
        notes: What a reader must know before all numbers.
    """

    policies: dict[str, str]
    scorers: dict[str, str]
    scores: tuple[PolicyScore, ...]
    comparisons: tuple[Comparison, ...] = ()
    published: tuple[PublishedScore, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
