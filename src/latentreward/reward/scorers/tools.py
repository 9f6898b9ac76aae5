"""Scorers of all images of a policy in one call: by any program, or from a table that another program wrote."""

import json
import os
import shutil
import signal
import subprocess
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_range, errors_at
from latentreward.core.storage.durable import write_file
from latentreward.data.score_table import read_table
from latentreward.reward.scorers.base import Scorer

FILE, PLACE = ("file",), ("place", "image")
"""Columns by which a row of a table of scores names an image."""
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that are not passed on, since they would make a program use latentreward's environment."""
DAY = 86_400.0  # default time limit of a program, in seconds
Headline = Literal["mean", "mean_of_groups"]


@dataclass(frozen=True)
class JudgedPicture:
    """One image of a policy, to be scored."""

    place: int  # Index of the prompt in the set of prompts, from 0
    image: int  # Number of the image of this prompt, from 0
    file: str  # File name of the image in the policy's folder
    path: Path  # Path of the image
    prompt: str  # Raw text
    group: str = ""  # Category of the prompt, such as GenEval's tag; empty if prompts have no categories
    fields: dict[str, Any] = field(default_factory=dict)  # Whole row of the prompt in the file of prompts


class ToolScorer(Scorer):
    """Base class of scorers that score all images of a policy in one call, for ``latentreward evaluate-policy``.

    Args:
        name: Name of the scores in reports.
        headline: Number reported first: ``mean`` over prompts, or ``mean_of_groups``, the mean of the groups' means.
    """

    def __init__(self, name: str, headline: Headline = "mean") -> None:
        super().__init__(name)
        self.headline = headline

    def prepare(self) -> None:
        """Check that the scorer can work; called before images are sampled.

        Raises:
            InputError: If it cannot.
        """

    @abstractmethod
    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """Score N images.

        Args:
            pictures: All images of a policy, sorted by prompt and number.
            policy: Name of the policy, put in place of ``{policy}`` in file names.
            work: Existing folder for input, output and logs of a program; may hold files of earlier calls.

        Returns:
            Finite scores ``(N,)``, float64.

        Raises:
            InputError: If a program fails, or a score is missing or not finite.
        """


class CommandScorer(ToolScorer):
    """A scorer that runs any program, once for all images of a policy.

    Args:
        command: Program (a relative path is one in ``folder``) and arguments. ``{pictures}`` is replaced by the path of
            the input, a file of JSON lines with the fields of :class:`JudgedPicture` for each image. ``{scores}`` is
            replaced by the path of the output that the program must write, a file of JSON lines with ``file`` and
            ``score`` of each image.
        name: Name of the scores in reports.
        folder: Working directory of the program; by default the folder with the program's input, output and log.
        timeout_s: Seconds after which the program and all processes that it started are killed.
        headline: Number reported first: ``mean`` over prompts, or ``mean_of_groups``, the mean of the groups' means.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        *,
        folder: Path | None = None,
        timeout_s: float = DAY,
        headline: Headline = "mean",
    ) -> None:
        super().__init__(name, headline)
        if not command or not any("{scores}" in part for part in command):
            raise InputError(f"command of {name} must hold {{scores}}, the file that it writes; add it")
        check_range("(0, inf]", timeout_s=timeout_s)
        self.command, self.folder, self.timeout_s = list(command), folder, timeout_s

    def identity(self) -> str:
        return f"{type(self).__name__} {' '.join(self.command)}"

    def prepare(self) -> None:
        """Check that the program exists; raise InputError if it does not."""
        program: str | Path = self.command[0]
        if "/" in self.command[0]:  # the system looks it up in the working directory, which without `folder` has none
            program = (self.folder or Path(os.devnull)).absolute() / program
        if shutil.which(program) is None:
            raise InputError(f"command of {self.name}: {self.command[0]} is no program; give its whole path")

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        table, scores = work / "pictures.jsonl", work / "scores.jsonl"
        rows = (asdict(item) | {"path": str(item.path.resolve())} for item in pictures)
        write_file(table, "".join(json.dumps(row) + "\n" for row in rows))
        scores.unlink(missing_ok=True)
        read, written = str(table.resolve()), str(scores.resolve())
        command = [part.replace("{pictures}", read).replace("{scores}", written) for part in self.command]
        self._run(command, self.folder or work, work / "log.txt")
        return look_up(self.name, scores, "score", pictures)

    def _run(self, command: Sequence[str], folder: Path, log: Path) -> None:
        """Run a program to its end in the working directory ``folder``, and write its stdout and stderr to ``log``."""
        environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        log.unlink(missing_ok=True)  # a link of this name would be followed
        with log.open("xb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                problem = f"cannot run {command[0]} in {folder} ({error.strerror})"
                raise InputError(f"{self.name}: {problem}; install it") from error
            try:
                status = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired as error:
                problem = f"no result after timeout_s={self.timeout_s:g}"
                raise InputError(f"{self.name}: {problem}; {_said(log)}") from error
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status:
            raise InputError(f"{self.name}: {Path(command[0]).name} ended with status {status}; {_said(log)}")


class ScoreFile(ToolScorer):
    """A scorer that reads scores computed elsewhere, e.g. by ImageReward or HPSv3 in their own environments.

    A row of the table names an image in one of two ways. A column ``file`` holds the path of the image, or its name if
    no other image has it. Or the columns ``place`` and ``image`` hold the index of the prompt and the number of the
    image, both from 0.

    Args:
        path: CSV (.csv), JSON lines (.jsonl) or parquet file; ``{policy}`` is replaced by the name of the policy.
        column: Column of the scores.
        name: Name of the scores in reports; ``column`` by default.
        headline: Number reported first: ``mean`` over prompts, or ``mean_of_groups``, the mean of the groups' means.
    """

    def __init__(
        self, path: PathText, column: str = "score", *, name: str | None = None, headline: Headline = "mean"
    ) -> None:
        super().__init__(name or column, headline)
        self.path, self.column = path, column

    def identity(self) -> str:
        return f"{type(self).__name__} {self.path} {self.column}"

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        return look_up(self.name, Path(self.path.replace("{policy}", policy)), self.column, pictures)


def look_up(name: str, path: Path, column: str, pictures: Sequence[JudgedPicture]) -> np.ndarray:
    """Look up the scores ``(N,)`` float64 of N images in a table; format and errors are those of :class:`ScoreFile`."""
    with errors_at(f"{name}: "):
        table = read_table(path)
    keys = next((keys for keys in (FILE, PLACE) if set(keys) <= set(table.column_names)), None)
    if keys is None or column not in table.column_names:
        wanted = f"{column!r}, and 'file' or 'place' and 'image'"
        raise InputError(f"{name}: {path} has the columns {', '.join(table.column_names)}; it needs {wanted}")
    scores: dict[Any, Any] = {}
    for row in table.select([*keys, column]).to_pylist():
        key = str(row["file"]) if keys == FILE else (row["place"], row["image"])
        if key in scores:
            raise InputError(f"{name}: {path} has several rows for {key!r}; leave one")
        scores[key] = row[column]
    named = Counter(picture.path.name for picture in pictures)
    return np.array([_score(name, path, scores, one, named[one.path.name] == 1) for one in pictures], dtype=np.float64)


def _score(name: str, path: Path, scores: Mapping[Any, Any], picture: JudgedPicture, by_name: bool) -> float:
    keys = [(picture.place, picture.image), picture.file, str(picture.path), *([picture.path.name] if by_name else [])]
    key = next((key for key in keys if key in scores), None)
    if key is None:
        raise InputError(f"{name}: {path} has no row for {picture.file!r}; write one for each picture, by its path")
    try:
        score = float(scores[key])
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {path} holds {scores[key]!r} for {picture.file!r}; it must be a number") from error
    if not np.isfinite(score):
        raise InputError(f"{name}: {path} holds {score} for {picture.file!r}; it must be a finite number")
    return score


def _said(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
    return f"last line: {lines[-1].strip()[:300]!r}, all in {log}" if lines else "it said nothing"
