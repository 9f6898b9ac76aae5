"""Base class of scorers that score all images of a policy in one call."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.scorers.base import Scorer


@dataclass(frozen=True)
class JudgedPicture:
    """One image of a policy, to be scored.

    Attributes:
        place: Index of the prompt in the set of prompts, from 0.
        image: Number of the image of this prompt, from 0.
        file: File name of the image in the policy's folder.
        path: Path of the image.
        prompt: Raw text.
        group: Category of the prompt, such as GenEval's tag; empty if prompts have no categories.
        fields: Whole row of the prompt in the file of prompts.
    """

    place: int
    image: int
    file: str
    path: Path
    prompt: str
    group: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


class ToolScorer(Scorer):
    """Base class of scorers that score all images of a policy in one call, for ``latentreward evaluate-policy``.

    Attributes:
        headline: Number reported first: ``mean`` over prompts, or ``mean_of_groups``, the mean of the groups' means.
        results: Path of existing results to read instead of running a program; None runs the program.
        versions: Versions of the program and its packages, set by :meth:`prepare` if they can be found.
    """

    headline: Literal["mean", "mean_of_groups"] = "mean"
    results: str | None = None
    versions: str = ""

    def identity(self) -> str:
        """See :meth:`Scorer.identity`: class, results and versions."""
        return " ".join(filter(None, (type(self).__name__, self.results, self.versions)))

    def prepare(self) -> None:
        """Check that the program can run; called before images are sampled.

        Raises:
            InputError: If the program cannot run.
        """

    def check(self, pictures: Sequence[JudgedPicture]) -> None:
        """Check that the scorer can handle the prompts; called before images are sampled, so files may not exist yet.

        Raises:
            InputError: If the scorer cannot handle a prompt.
        """

    @abstractmethod
    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """Score N images.

        Args:
            pictures: All images of a policy, sorted by prompt and number.
            policy: Name of the policy, put in place of ``{policy}`` in file names.
            work: Existing folder for input, output and logs of the program; may hold files of earlier calls.

        Returns:
            Finite scores ``(N,)``, float64.

        Raises:
            InputError: If the program fails, or a score is missing or not finite.
        """
