"""Scoring of a policy's pictures by all scorers; scores are kept in files and reused."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.apps.evaluation.policy.statistics import ScoredPictures
from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.errors import InputError, did_you_mean, first_line
from latentreward.core.interrupts import interrupts_held
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.progress import Progress
from latentreward.core.workers import SharedWork
from latentreward.data import decode_image
from latentreward.data.images import image_bytes
from latentreward.reward import ImageScorer, Scorer
from latentreward.reward.scorers.base import one_model
from latentreward.reward.scorers.fingerprints import scorer_fingerprints
from latentreward.reward.scorers.tools import JudgedPicture, ToolScorer

CHUNK = 64
"""Number of pictures decoded at a time; a killed process loses the scores of at most this many pictures."""
SCORES_OF = "scores of {}"
"""Format of the name of the task that scores the pictures of a policy, from the name of the policy's folders."""
AGAIN = "delete {}, and the same command scores those pictures again, or serve the model of the kept scores"
Scores = tuple[float, ...]


class ScoreStore:
    """File of one scorer's scores for one policy, keyed by the content of a picture and its prompt.

    A file of another scorer, or of other files of this one, is replaced at the next :meth:`add`.

    Args:
        path: File of JSON lines; the first line holds the identity of the scorer, and the model of its server.
        identity: Identity of the scorer and its files.
        order: Keys in the order in which their scores are written; others come before them.
    """

    def __init__(self, path: Path, identity: str, order: Sequence[str] = ()) -> None:
        self.path, self.identity = path, identity
        self._places = {key: place for place, key in enumerate(order)}
        self.scores: dict[str, Scores] = {}  # of a picture, by its key
        self.model: str | None = None  # model that a server named with the scores; None if there was none
        if not path.is_file():
            return
        try:
            head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if head["scorer"] == identity:
                self.scores = {row["picture"]: tuple(map(float, row["scores"])) for row in rows}
                self.model = head.get("model")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            remedy = "delete it, and the same command scores those pictures again"
            raise InputError(f"{path} is damaged ({first_line(error)}); {remedy}") from error

    @interrupts_held()
    def add(self, scores: Mapping[str, Scores], model: str | None = None) -> None:
        """Add scores and rewrite the file; the old file stays until the new one is complete."""
        self.model = one_model(self.path.stem, self.model, model, AGAIN.format(self.path))
        self.scores = dict(sorted((self.scores | scores).items(), key=lambda item: self._places.get(item[0], -1)))
        head = {"scorer": self.identity} | ({} if self.model is None else {"model": self.model})
        rows = [head, *({"picture": key, "scores": row} for key, row in self.scores.items())]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def check_names(scorers: Sequence[Scorer]) -> None:
    """Check that all scorers score pictures, and that no two scores have one name."""
    if not scorers:
        raise InputError("there is no scorer; set scorers, e.g. to latentreward.reward.PickScorer")
    for scorer in scorers:
        if not isinstance(scorer, (ImageScorer, ToolScorer)):
            kind = type(scorer).__name__
            raise InputError(f"scorers: {kind} scores pairs, not pictures{did_you_mean(kind, ['ScoreFile'])}")
    names = [name for scorer in scorers for name in scorer.columns]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"scorers: several are called {min(repeated)!r}; give each a name of its own")


def scoring_task(
    scorers: Sequence[Scorer], prepare: Callable[[], None], given: None
) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Load the scorers of images, and return the function that scores a chunk of pictures.

    It yields ``scores``, by name of the scorer, and ``models`` that servers named with them.
    """
    prepare()

    def score(chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        pixels = [decode_image(ImageRef(file, content)) for file, content, _ in chunk["pictures"]]
        found, models = {}, {}
        for scorer in scorers:
            if isinstance(scorer, ImageScorer) and (wanted := chunk["wanted"][scorer.name]):
                prompts = [chunk["pictures"][row][2] for row in wanted]
                scores = scorer(prompts, [pixels[row] for row in wanted])
                found[scorer.name] = [tuple(row) for row in scores.reshape(len(wanted), -1).tolist()]
                models[scorer.name] = scorer.served_model
        yield {"scores": found, "models": models}

    return score


class PictureScoring:
    """Scoring of one policy's pictures.

    Args:
        policy: Name of the policy.
        pictures: Pictures of the policy, in order of prompts and of numbers within a prompt.
        scorers: Scorers that passed :func:`check_names`.
        folder: Folder of the files of scores and of whole-set scorers; its name is that of the policy's folders.
        work: Processes that score.
    """

    def __init__(
        self, policy: str, pictures: Sequence[JudgedPicture], scorers: Sequence[Scorer], folder: Path, work: SharedWork
    ) -> None:
        self.policy, self.pictures, self.scorers, self.folder = policy, tuple(pictures), list(scorers), folder
        self._work = work
        self._keys = [_key(picture) for picture in pictures]
        self.stores: dict[str, ScoreStore] = {}
        for scorer in scorers:
            files = scorer_fingerprints(scorer, policy)  # so that changed files invalidate kept scores
            identity = f"{scorer.identity()}, files {json.dumps(files)}" if files else scorer.identity()
            self.stores[scorer.name] = ScoreStore(folder / f"{scorer.name}.jsonl", identity, self._keys)

    def missing(self, scorer: Scorer, rows: Sequence[int] | None = None) -> list[int]:
        """Return the indices, among ``rows`` or all pictures, of those that a scorer has not scored yet."""
        kept, rows = self.stores[scorer.name].scores, range(len(self._keys)) if rows is None else rows
        return [place for place, row in enumerate(rows) if self._keys[row] not in kept]

    def chunks(self) -> list[list[int]]:
        """List the rows of pictures that lack scores, by chunks of pictures.

        All pictures are cut, and then those with all scores are left out: a run that goes on scores pictures together
        with those that a run without a stop would score them with.
        """
        left = {row for one in self.scorers if isinstance(one, ImageScorer) for row in self.missing(one)}
        cut = (range(start, start + CHUNK) for start in range(0, len(self.pictures), CHUNK))
        return [rows for chunk in cut if (rows := [row for row in chunk if row in left])]

    def score(self) -> ScoredPictures:
        """Score the missing pictures and return all scores, which are finite."""
        chunks, total = self.chunks(), len(self.pictures)
        images = {scorer.name: scorer for scorer in self.scorers if isinstance(scorer, ImageScorer)}

        def send(rows: list[int]) -> dict[str, Any]:
            """Return what :func:`scoring_task` takes: ``pictures`` as [file, content, prompt], and places to score."""
            of = [self.pictures[row] for row in rows]
            sent = [[picture.file, picture.path.read_bytes(), picture.prompt] for picture in of]
            return {"pictures": sent, "wanted": {name: self.missing(one, rows) for name, one in images.items()}}

        with Progress(f"scores of {self.policy}", total, "pictures", total - sum(map(len, chunks))) as progress:

            def keep(rows: list[int], found: dict[str, Any]) -> None:
                for name, scores in found["scores"].items():
                    scored = [self._keys[rows[place]] for place in self.missing(images[name], rows)]
                    self.stores[name].add(dict(zip(scored, scores, strict=True)), found["models"][name])
                progress.add(len(rows))

            self._work.run(SCORES_OF.format(self.folder.name), None, chunks, keep, send)
        found: dict[str, np.ndarray] = {}
        for scorer in self.scorers:
            if isinstance(scorer, ToolScorer) and self.missing(scorer):
                self._score_at_once(scorer)
            rows = np.array([self.stores[scorer.name].scores[key] for key in self._keys], dtype=np.float64)
            found |= dict(zip(scorer.columns, rows.T, strict=True))
        return ScoredPictures(self.policy, self.pictures, found)

    def _score_at_once(self, scorer: ToolScorer) -> None:
        folder, total = self.folder / f"{scorer.name}.work", len(self.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{self.policy}: {scorer.name} of {total} pictures", file=sys.stderr, flush=True)
        scores = scorer.score_pictures(self.pictures, self.policy, folder)
        if scores.shape != (total,) or not np.isfinite(scores).all():
            raise InputError(f"scorer {scorer.name!r} gave no finite number for each of {total} pictures")
        self.stores[scorer.name].add({key: (float(one),) for key, one in zip(self._keys, scores, strict=True)})


def _key(picture: JudgedPicture) -> str:
    """Return a hash of a picture and its prompt, with index and number too, which whole-set scorers use."""
    named = json.dumps([picture.prompt, picture.place, picture.image])
    return digest([picture.path.read_bytes(), named, *map(image_bytes, sources_of(picture.prompt))])


def require_one_model(scorings: Sequence[PictureScoring]) -> None:
    """Check that each server has scored the pictures of all policies with one model; call it when they are scored."""
    for name in scorings[0].stores:
        stores = [scoring.stores[name] for scoring in scorings]
        either = " or ".join(str(store.path) for store in stores)
        for store in stores:
            one_model(name, stores[0].model, store.model, AGAIN.format(either))
