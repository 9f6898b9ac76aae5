"""Results of an evaluation of generators as dataclasses, from which JSON, Markdown and HTML reports are written."""

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
        pictures: N pictures, in order of prompts and of numbers within a prompt.
        scores: Name of a score → ``(N,)`` float64.
    """

    policy: str
    pictures: tuple[JudgedPicture, ...]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class GroupMean:
    """Mean score over the prompts of one group.

    Attributes:
        group: Name of the group.
        prompts: Number of prompts.
        estimate: Mean over the group's pictures, with an interval over prompts.
        parts_sd: Standard deviation of the means of consecutive parts of the group's prompts; NaN with one part.
    """

    group: str
    prompts: int
    estimate: Interval
    parts_sd: float


@dataclass(frozen=True)
class PolicyScore:
    """Result of one policy by one score.

    Attributes:
        policy: Name of the policy.
        score: Name of the score.
        headline: Attribute that the score's own protocol reports: ``mean`` or ``mean_of_groups``.
        mean: Mean over all pictures, with an interval over prompts.
        mean_of_groups: Mean of the groups' means; None with one group.
        groups: Result of each group; empty with one group that is not cut into parts.
        pictures: Number of pictures.
        prompts: Number of prompts.
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
        """Number that the score's own protocol reports: ``mean_of_groups`` or ``mean``."""
        return self.mean_of_groups if self.headline == "mean_of_groups" and self.mean_of_groups else self.mean


@dataclass(frozen=True)
class Comparison:
    """Comparison of two policies by one score, over pairs of pictures with the same prompt and number.

    Attributes:
        score: Name of the score.
        group: Name of the group of prompts; empty for all prompts.
        win_rate: Share of pairs in which the first policy scores higher; ties count ½.
        difference: Mean of the first policy's score minus the second's.
        wins: Number of pairs in which the first policy scores higher.
        ties: Number of pairs with equal scores.
        losses: Number of pairs in which the second policy scores higher.
        prompts: Number of prompts.
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
    """Score published by others, shown beside ours."""

    model: str
    score: str
    value: float
    source: str


@dataclass(frozen=True)
class PolicyReport:
    """Results of one run of ``latentreward evaluate-policy``.

    Attributes:
        policies: Name of a policy → description in one line.
        scorers: Name of a scorer → identity in one line.
        scores: All scores of all policies.
        comparisons: Comparisons of the two policies; empty with one policy.
        published: Scores published by the authors of the protocol.
        settings: Settings of the run, and versions of the packages that computed it.
        notes: Remarks shown before all numbers.
    """

    policies: dict[str, str]
    scorers: dict[str, str]
    scores: tuple[PolicyScore, ...]
    comparisons: tuple[Comparison, ...] = ()
    published: tuple[PublishedScore, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
