"""Scorers of all images of a policy in one call: by any program, or from a table that another program wrote."""

import json
import os
import shutil
import signal
import subprocess
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_range, errors_at
from latentreward.core.storage.durable import write_file
from latentreward.data.score_table import numbers, read_table
from latentreward.reward.scorers.base import Scorer

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that are not passed on, since they would make a program use latentreward's environment."""
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
        """Check that the scorer can work; raise InputError if it cannot. Called before images are sampled."""

    @abstractmethod
    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """Score N images of a policy, sorted by prompt and number: finite scores ``(N,)``, float64.

        ``policy`` is put in place of ``{policy}`` in file names. ``work`` is an existing folder for input, output and
        logs of a program; it may hold files of earlier calls.
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
        timeout_s: float = 86_400.0,
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
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            try:
                process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
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

    The column ``file`` of the table holds the path of an image, or its name if no other image has it.

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
        if not {"file", column} <= {*table.column_names}:
            known = ", ".join(table.column_names)
            raise InputError(f"{path} has the columns {known}; it needs {column!r} and 'file'")
        keys = [str(key) for key in table.column("file").to_pylist()]
        scores = dict(zip(keys, numbers(table, column, path).tolist(), strict=True))
        if len(scores) < len(keys):
            twice = next(key for key, number in Counter(keys).items() if number > 1)
            raise InputError(f"{path} has several rows for {twice!r}; leave one")
        named = Counter(picture.path.name for picture in pictures)
        found = []
        for one in pictures:
            names = [one.file, str(one.path), *([one.path.name] if named[one.path.name] == 1 else [])]
            key = next((key for key in names if key in scores), None)
            if key is None:
                raise InputError(f"{path} has no row for {one.file!r}; write one for each picture, by its path")
            if not np.isfinite(scores[key]):
                raise InputError(f"{path} holds {scores[key]} for {one.file!r}; it must be a finite number")
            found.append(scores[key])
    return np.array(found, dtype=np.float64)


def _said(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
    return f"last line: {lines[-1].strip()[:300]!r}, all in {log}" if lines else "it said nothing"
