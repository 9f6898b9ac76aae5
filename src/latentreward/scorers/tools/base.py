"""What a scorer of a whole set of pictures promises."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.scorers.base import Scorer


@dataclass(frozen=True)
class JudgedPicture:
    """One picture of a policy.

    Attributes:
        place: Number of its prompt in the set.
        image: Number of the picture of that prompt.
        file: Its name in the folder of the policy.
        path: Where it lies.
        prompt: Raw text.
        group: Kind of prompt, such as GenEval's tag; empty where there is none.
        fields: The prompt's whole row in the file of prompts.
    """

    place: int
    image: int
    file: str
    path: Path
    prompt: str
    group: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


class ToolScorer(Scorer):
    """Scores all pictures of a policy in one go.

    Attributes:
        headline: What of the scores is reported first: the mean over prompts, or the mean of the groups' means.
        results: What is read instead of a run, if anything.
        versions: Of what runs, as far as they are known.
    """

    headline: Literal["mean", "mean_of_groups"] = "mean"
    results: str | None = None
    versions: str = ""

    def identity(self) -> str:
        """Class, and results or versions."""
        return " ".join(filter(None, (type(self).__name__, self.results, self.versions)))

    def prepare(self) -> None:
        """Find out whether it can run; called before anything is sampled."""

    def check(self, pictures: Sequence[JudgedPicture]) -> None:
        """Refuse prompts that it cannot judge; called before anything is sampled, when no picture need exist yet."""

    @abstractmethod
    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """Scores ``(N,)`` float64 of N pictures, finite.

        Args:
            pictures: All pictures of a policy, by place and number.
            policy: Name of the policy, which stands in for ``{policy}`` in names of files.
            work: Folder for what it needs and writes; made by the caller, and not cleared.
        """
