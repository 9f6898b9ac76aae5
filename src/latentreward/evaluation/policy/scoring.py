"""All pictures of a policy by all scorers."""

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
"""Pictures in memory at a time, and what a kill can lose of their scores."""


Scores = tuple[float, ...]


class ScoreStore:
    """Scores of one scorer for one policy, by the content of pictures and by their prompts.

    A score counts only for the same bytes, prompt and scorer; whatever else the file holds is forgotten, as is a
    damaged file.

    Args:
        path: JSON lines, the first of which says which scorer it was.
        identity: Of the scorer and its files.
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
        """Scores of a picture, None if they are not known."""
        return self._known.get(key)

    @interrupts_held()
    def add(self, scores: Mapping[str, Scores]) -> None:
        """Remember scores; the file is whole at any moment."""
        self._known |= scores
        rows = [{"scorer": self.identity}, *({"picture": key, "scores": row} for key, row in self._known.items())]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def picture_key(picture: JudgedPicture) -> str:
    """Name of a picture's bytes and prompt, and of its place in the set, which whole-set scorers go by."""
    return digest([picture.path.read_bytes(), json.dumps([picture.prompt, picture.place, picture.image])])


def score_names(scorers: Sequence[Scorer]) -> list[str]:
    """Names of all scores.

    Raises:
        InputError: If there is no scorer, two share a name, or one scores pairs alone.
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
    """Scores of one policy's pictures, remembered in ``folder``.

    Args:
        policy: Name of the policy.
        pictures: All of them, by place and number.
        scorers: What scores them; :func:`score_names` has found nothing wrong with them.
        folder: Where scores are kept, and where whole-set scorers work.
    """

    def __init__(self, policy: str, pictures: Sequence[JudgedPicture], scorers: Sequence[Scorer], folder: Path) -> None:
        self.policy, self.pictures, self.scorers, self.folder = policy, tuple(pictures), list(scorers), folder
        self._keys = [picture_key(picture) for picture in pictures]
        self._stores = {
            scorer.name: ScoreStore(folder / f"{scorer.name}.jsonl", told_apart(scorer, policy)) for scorer in scorers
        }

    def missing(self, scorer: Scorer) -> list[int]:
        """Rows of pictures that it has not scored yet."""
        store = self._stores[scorer.name]
        return [row for row, key in enumerate(self._keys) if store.get(key) is None]

    def score(self) -> ScoredPictures:
        """Score what is missing.

        Raises:
            InputError: If a scorer fails, or returns what is no finite number.
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
    """Identity of a scorer with what its files hold, so that one trained or measured again is scored anew."""
    files = scorer_fingerprints(scorer, policy)
    return f"{scorer.identity()}, files {json.dumps(files)}" if files else scorer.identity()
