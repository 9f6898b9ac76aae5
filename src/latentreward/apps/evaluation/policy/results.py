"""Scored pictures of generators, and the results from which JSON, Markdown and HTML reports are written."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentreward.reports.tables import Row
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


def scores_csv(scored: Sequence[ScoredPictures]) -> str:
    """Return the text of ``scores.csv``: a line for each picture with all its scores."""
    names = list(scored[0].scores)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["policy", "place", "image", "group", "file", "prompt", *names])
    for policy in scored:
        for row, picture in enumerate(policy.pictures):
            values = [f"{policy.scores[name][row]:.8g}" for name in names]
            own = [picture.place, picture.image, picture.group, picture.file, picture.prompt]
            writer.writerow([policy.policy, *own, *values])
    return text.getvalue()


@dataclass(frozen=True)
class PolicyReport:
    """Results of one run of ``latentreward evaluate-policy``.

    Attributes:
        policies: Name of a policy → description in one line.
        scorers: Name of a scorer → identity in one line.
        scores: Rows with the result of one ``policy`` by one ``score``. ``headline``: name of the value that the
            score's own protocol reports. ``mean``: Interval of the mean over all pictures, by resampling prompts.
            ``mean_of_groups``: that of the mean of the groups' means; None with one group. ``groups``: rows with the
            result of each ``group`` of prompts; empty with one group that is not cut into parts. ``pictures`` and
            ``prompts``: their numbers. The row of a group has ``prompts``, ``estimate`` (mean over the group's
            pictures) and ``parts_sd``, the standard deviation of the means of consecutive parts of the group's prompts,
            NaN with one part.
        comparisons: Rows that compare the two policies by one ``score``, over pairs of pictures with the same prompt
            and number; empty with one policy. ``group``: group of prompts, empty for all. ``win_rate``: share of pairs
            in which the first policy scores higher; ties count ½. ``difference``: mean of the first policy's score
            minus the second's. ``wins``, ``ties``, ``losses`` and ``prompts``: their numbers.
        published: Scores published by the authors of the protocol: ``model``, ``score``, ``value``, ``source``.
        settings: Settings of the run, and versions of the packages that computed it.
        notes: Remarks shown before all numbers.
    """

    policies: dict[str, str]
    scorers: dict[str, str]
    scores: Sequence[Row]
    comparisons: Sequence[Row] = ()
    published: Sequence[Row] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
