"""Scorer that reads scores from a table written by another program."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.contracts import PathText
from latentreward.data.score_table import read_table
from latentreward.errors import InputError, errors_at
from latentreward.scorers.tools.base import JudgedPicture, ToolScorer

FILE, PLACE = ("file",), ("place", "image")


class ScoreFile(ToolScorer):
    """A scorer that reads scores computed elsewhere, e.g. by ImageReward or HPSv3 in their own environments.

    A row of the table names an image in one of two ways. A column ``file`` holds the path of the image, or its name if
    no other image has it. Or the columns ``place`` and ``image`` hold the index of the prompt and the number of the
    image, both from 0.

    Args:
        path: CSV (.csv), JSON lines (.jsonl) or parquet file; ``{policy}`` is replaced by the name of the policy.
        column: Column of the scores.
        name: Name of the scores in reports; ``column`` by default.

    Raises:
        InputError: If the file cannot be read, has no row for an image, or holds values other than finite numbers.
    """

    def __init__(self, path: PathText, column: str = "score", *, name: str | None = None) -> None:
        super().__init__(name or column)
        self.path, self.column = path, column

    def identity(self) -> str:
        """See :meth:`Scorer.identity`: class, file and column."""
        return f"{type(self).__name__} {self.path} {self.column}"

    def score_pictures(self, pictures: Sequence[JudgedPicture], policy: str, work: Path) -> np.ndarray:
        """See :meth:`ToolScorer.score_pictures`."""
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
