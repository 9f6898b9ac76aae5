"""Scoring of a policy's pictures by all scorers; scores are kept in files and reused."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latentreward.contracts import ImageRef
from latentreward.data.images import decode_image
from latentreward.errors import InputError, did_you_mean
from latentreward.evaluation.policy.results import ScoredPictures
from latentreward.interrupts import interrupts_held
from latentreward.scorers import ImageScorer, Scorer
from latentreward.scorers.fingerprints import scorer_fingerprints
from latentreward.scorers.tools import JudgedPicture, ToolScorer
from latentreward.storage.digests import digest
from latentreward.storage.durable import write_file
from latentreward.storage.progress import Progress

CHUNK = 64
"""Number of pictures decoded at a time; a killed process loses the scores of at most this many pictures."""


Scores = tuple[float, ...]


class ScoreStore:
    """File of one scorer's scores for one policy, keyed by the content of a picture and its prompt.

    A file that is damaged or was written by another scorer is ignored, and replaced at the next :meth:`add`.

    Args:
        path: File of JSON lines; the first line holds the identity of the scorer.
        identity: Identity of the scorer and its files.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._known: dict[str, Scores] = {}
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) == {"scorer": identity}:
                self._known = {row["picture"]: tuple(row["scores"]) for row in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError):
            self._known = {}

    def get(self, key: str) -> Scores | None:
        """Return the scores of a picture, by its :func:`picture_key`; None if the picture has not been scored."""
        return self._known.get(key)

    @interrupts_held()
    def add(self, scores: Mapping[str, Scores]) -> None:
        """Add scores and rewrite the file; the old file stays until the new one is complete."""
        self._known |= scores
        rows = [{"scorer": self.identity}, *({"picture": key, "scores": row} for key, row in self._known.items())]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def picture_key(picture: JudgedPicture) -> str:
    """Return a hash of a picture's bytes and prompt, and of prompt index and number, which whole-set scorers use."""
    return digest([picture.path.read_bytes(), json.dumps([picture.prompt, picture.place, picture.image])])


def score_names(scorers: Sequence[Scorer]) -> list[str]:
    """Return the names of all scores.

    Raises:
        InputError: If there is no scorer, two scores share a name, or a scorer accepts pairs only.
    """
    if not scorers:
        raise InputError("there is no scorer; set scorers, e.g. to latentreward.scorers.PickScorer")
    for scorer in scorers:
        if not isinstance(scorer, (ImageScorer, ToolScorer)):
            kind = type(scorer).__name__
            raise InputError(f"scorers: {kind} scores pairs, not pictures{did_you_mean(kind, ['ScoreFile'])}")
    names = [name for scorer in scorers for name in scorer.columns]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"scorers: several are called {min(repeated)!r}; give each a name of its own")
    return names


class PictureScoring:
    """Scoring of one policy's pictures, with scores kept in ``folder``.

    Args:
        policy: Name of the policy.
        pictures: Pictures of the policy, in order of prompts and of numbers within a prompt.
        scorers: Scorers that passed :func:`score_names`.
        folder: Folder of the files of scores, and of the working folders of whole-set scorers.
    """

    def __init__(self, policy: str, pictures: Sequence[JudgedPicture], scorers: Sequence[Scorer], folder: Path) -> None:
        self.policy, self.pictures, self.scorers, self.folder = policy, tuple(pictures), list(scorers), folder
        self._keys = [picture_key(picture) for picture in pictures]
        self._stores = {
            scorer.name: ScoreStore(folder / f"{scorer.name}.jsonl", told_apart(scorer, policy)) for scorer in scorers
        }

    def missing(self, scorer: Scorer) -> list[int]:
        """Return the rows of the pictures that a scorer has not scored yet."""
        store = self._stores[scorer.name]
        return [row for row, key in enumerate(self._keys) if store.get(key) is None]

    def score(self) -> ScoredPictures:
        """Score the missing pictures and return all scores.

        Raises:
            InputError: If a scorer fails or returns a number that is not finite.
        """
        images = [scorer for scorer in self.scorers if isinstance(scorer, ImageScorer)]
        missing, total = sorted({row for scorer in images for row in self.missing(scorer)}), len(self.pictures)
        with Progress(f"scores of {self.policy}", total, "pictures", total - len(missing)) as progress:
            for start in range(0, len(missing), CHUNK):
                rows = missing[start : start + CHUNK]
                self._score_images(images, rows)
                progress.add(len(rows))
        for scorer in self.scorers:
            if isinstance(scorer, ToolScorer) and self.missing(scorer):
                self._score_set(scorer)
        return ScoredPictures(self.policy, self.pictures, self._all())

    def _score_images(self, scorers: Sequence[ImageScorer], rows: Sequence[int]) -> None:
        pixels = {row: decode_image(ImageRef(self.pictures[row].file, path=self.pictures[row].path)) for row in rows}
        for scorer in scorers:
            store = self._stores[scorer.name]
            wanted = [row for row in rows if store.get(self._keys[row]) is None]
            scores = scorer([self.pictures[row].prompt for row in wanted], [pixels[row] for row in wanted])
            values = scores.reshape(len(wanted), -1).tolist()
            store.add({self._keys[row]: tuple(value) for row, value in zip(wanted, values, strict=True)})

    def _score_set(self, scorer: ToolScorer) -> None:
        work = self.folder / f"{scorer.name}.work"
        work.mkdir(parents=True, exist_ok=True)
        print(f"{self.policy}: {scorer.name} of {len(self.pictures)} pictures", file=sys.stderr, flush=True)
        scores = scorer.score_pictures(self.pictures, self.policy, work)
        if scores.shape != (len(self.pictures),) or not np.isfinite(scores).all():
            raise InputError(f"scorer {scorer.name!r} gave no finite number for each of {len(self.pictures)} pictures")
        self._stores[scorer.name].add({key: (float(score),) for key, score in zip(self._keys, scores, strict=True)})

    def _all(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for scorer in self.scorers:
            rows = np.array([self._stores[scorer.name].get(key) for key in self._keys], dtype=np.float64)
            found |= dict(zip(scorer.columns, rows.T, strict=True))
        return found


def told_apart(scorer: Scorer, policy: str) -> str:
    """Return a scorer's identity with fingerprints of its files, so that changed files invalidate kept scores."""
    files = scorer_fingerprints(scorer, policy)
    return f"{scorer.identity()}, files {json.dumps(files)}" if files else scorer.identity()
