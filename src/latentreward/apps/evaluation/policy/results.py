"""Scored pictures of generators, the results from which reports are written, and numbers that LPO's authors report."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from latentreward.core.reports.tables import Row
from latentreward.reward.scorers.tools import JudgedPicture

Protocol = Literal["lpo_sd15", "lpo_sdxl"]
"""Base model, by whose protocol LPO's authors evaluate."""
SOURCE = "arXiv:2502.01051 (LPO), measured by its authors"
SCORES = ("pickscore", "imagereward", "aesthetic", "geneval")
"""Names of our scores that the numbers are comparable with; GenEval is a share in [0, 1], at 20 sampling steps."""
NUMBERS: dict[Protocol, dict[str, tuple[float, ...]]] = {
    "lpo_sd15": {
        "SD1.5": (20.56, 0.008, 5.468, 0.4256),
        "SPO, SD1.5": (21.22, 0.168, 5.927, 0.4046),
        "LPO, SD1.5": (21.69, 0.659, 5.945, 0.4839),
    },
    "lpo_sdxl": {
        "SDXL": (21.65, 0.478, 5.920, 0.4940),
        "SPO, SDXL": (22.70, 0.995, 6.343, 0.5052),
        "LPO, SDXL": (22.86, 1.217, 6.360, 0.5927),
    },
}


def published_scores(protocol: Protocol) -> list[Row]:
    """Return all published scores for the protocol of one base model, as in :attr:`PolicyReport.published`."""
    return [
        {"model": model, "score": score, "value": value, "source": SOURCE}
        for model, values in NUMBERS[protocol].items()
        for score, value in zip(SCORES, values, strict=True)
    ]


@dataclass(frozen=True)
class ScoredPictures:
    """Pictures of one policy with all scores."""

    policy: str  # name of the policy
    pictures: tuple[JudgedPicture, ...]  # N pictures, in order of prompts and of numbers within a prompt
    scores: dict[str, np.ndarray]  # name of a score → ``(N,)`` float64


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
    """Results of one run of ``latentreward evaluate-policy``."""

    policies: dict[str, str]  # name of a policy → description in one line
    scorers: dict[str, str]  # name of a scorer → identity in one line
    # Rows with the result of one ``policy`` by one ``score``. ``headline``: name of the value that the score's own
    # protocol reports. ``mean``: Interval of the mean over all pictures, by resampling prompts. ``mean_of_groups``:
    # that of the mean of the groups' means; None with one group. ``groups``: rows with the result of each ``group`` of
    # prompts; empty with one group that is not cut into parts. ``pictures`` and ``prompts``: their numbers. The row of
    # a group has ``prompts``, ``estimate`` (mean over the group's pictures) and ``parts_sd``, the standard deviation of
    # the means of consecutive parts of the group's prompts, NaN with one part.
    scores: Sequence[Row]
    # Rows that compare the two policies by one ``score``, over pairs of pictures with the same prompt and number; empty
    # with one policy. ``group``: group of prompts, empty for all. ``win_rate``: share of pairs in which the first
    # policy scores higher; ties count ½. ``difference``: mean of the first policy's score minus the second's, of the
    # kind that ``headline`` of ``scores`` names. ``wins``, ``ties``, ``losses`` and ``prompts``: their numbers.
    comparisons: Sequence[Row] = ()
    # Rows with the Interval ``correlation`` within prompts of a reward's scores of the states of one ``policy``
    # ``after_steps`` finished steps, at noise level ``sigma``, with its scores of the finished samples; empty without
    # ``state_scores``.
    states: Sequence[Row] = ()
    # Scores published by the authors of the protocol: ``model``, ``score``, ``value``, ``source``
    published: Sequence[Row] = ()
    # Settings of the run, and versions of the packages that computed it
    settings: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()  # remarks shown before all numbers
