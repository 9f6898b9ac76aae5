"""Scoring of a policy's pictures by all scorers; scores are kept in files and reused."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.apps.evaluation.policy.results import ScoredPictures
from latentreward.core.contracts import ImageRef, sources_of
from latentreward.core.errors import InputError, did_you_mean, first_line
from latentreward.core.interrupts import interrupts_held
from latentreward.core.shared_work import SharedWork
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import write_file
from latentreward.core.storage.progress import Progress
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
Scores = tuple[float, ...]


class ScoreStore:
    """File of one scorer's scores for one policy, keyed by the content of a picture and its prompt.

    A file of another scorer, or of other files of this one, is replaced at the next :meth:`add`.

    Args:
        path: File of JSON lines; the first line holds the identity of the scorer, and the model of its server.
        identity: Identity of the scorer and its files.
        order: Keys in the order in which their scores are written; others come before them.

    Raises:
        InputError: If the file is damaged.
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
        self.model = one_model(self.path.stem, self.model, model, again([self.path]))
        self.scores = dict(sorted((self.scores | scores).items(), key=lambda item: self._places.get(item[0], -1)))
        head = {"scorer": self.identity} | ({} if self.model is None else {"model": self.model})
        rows = [head, *({"picture": key, "scores": row} for key, row in self.scores.items())]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def score_names(scorers: Sequence[Scorer]) -> list[str]:
    """Return the names of all scores."""
    if not scorers:
        raise InputError("there is no scorer; set scorers, e.g. to latentreward.reward.PickScorer")
    for scorer in scorers:
        if not isinstance(scorer, (ImageScorer, ToolScorer)):
            kind = type(scorer).__name__
            raise InputError(f"scorers: {kind} scores pairs, not pictures{did_you_mean(kind, ['ScoreFile'])}")
    names = [name for scorer in scorers for name in scorer.columns]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"scorers: several are called {min(repeated)!r}; give each a name of its own")
    return names


def scoring_task(
    scorers: Sequence[Scorer], prepare: Callable[[], None], chunks: Sequence[dict[str, Any]]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the scorers of images, and return the function that scores a chunk of pictures.

    It returns ``scores``, by name of the scorer, and ``models`` that servers named with them.
    """
    prepare()
    images = [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]

    def score(chunk: dict[str, Any]) -> dict[str, Any]:
        pixels = [decode_image(ImageRef(file, path=Path(path))) for file, path, _ in chunk["pictures"]]
        found, models = {}, {}
        for scorer in images:
            if wanted := chunk["wanted"].get(scorer.name):
                prompts = [chunk["pictures"][row][2] for row in wanted]
                scores = scorer(prompts, [pixels[row] for row in wanted])
                found[scorer.name] = [tuple(row) for row in scores.reshape(len(wanted), -1).tolist()]
                models[scorer.name] = scorer.served_model
        return {"scores": found, "models": models}

    return score


class PictureScoring:
    """Scoring of one policy's pictures.

    Args:
        policy: Name of the policy.
        pictures: Pictures of the policy, in order of prompts and of numbers within a prompt.
        scorers: Scorers that passed :func:`score_names`.
        folder: Folder of the files of scores and of whole-set scorers; its name is that of the policy's folders.
        work: Processes that score.
    """

    def __init__(
        self, policy: str, pictures: Sequence[JudgedPicture], scorers: Sequence[Scorer], folder: Path, work: SharedWork
    ) -> None:
        self.policy, self.pictures, self.scorers, self.folder = policy, tuple(pictures), list(scorers), folder
        self._work, self._task = work, SCORES_OF.format(folder.name)
        self._keys = [  # prompt index and number too, which whole-set scorers use
            digest(
                [
                    one.path.read_bytes(),
                    json.dumps([one.prompt, one.place, one.image]),
                    *map(image_bytes, sources_of(one.prompt)),
                ]
            )
            for one in pictures
        ]
        self.stores: dict[str, ScoreStore] = {}
        for scorer in scorers:
            files = scorer_fingerprints(scorer, policy)  # so that changed files invalidate kept scores
            identity = f"{scorer.identity()}, files {json.dumps(files)}" if files else scorer.identity()
            self.stores[scorer.name] = ScoreStore(folder / f"{scorer.name}.jsonl", identity, self._keys)
        self._keep(work.left_over(self._task))

    def missing(self, scorer: Scorer) -> list[int]:
        """Return the rows of the pictures that a scorer has not scored yet."""
        return [row for row, key in enumerate(self._keys) if key not in self.stores[scorer.name].scores]

    def chunks(self) -> list[dict[str, Any]]:
        """List what scorers of images have to do, by chunks of pictures.

        All pictures are cut, and then those with all scores are left out: a run that goes on scores pictures together
        with those that a run without a stop would score them with. A chunk holds its unscored ``pictures`` as [file,
        path, prompt], their ``keys``, the ``identities`` of scorers by name, and indices of the pictures that each has
        not scored, ``wanted``.
        """
        missing = {one.name: {*self.missing(one)} for one in self.scorers if isinstance(one, ImageScorer)}
        left, found = set().union(*missing.values()), []
        for start in range(0, len(self.pictures), CHUNK):
            if rows := [row for row in range(start, min(start + CHUNK, len(self.pictures))) if row in left]:
                chunk = {
                    "pictures": [[p.file, str(p.path), p.prompt] for p in (self.pictures[row] for row in rows)],
                    "keys": [self._keys[row] for row in rows],
                    "wanted": {name: [n for n, row in enumerate(rows) if row in of] for name, of in missing.items()},
                    "identities": {name: self.stores[name].identity for name in missing},
                }
                found.append(chunk)
        return found

    def score(self) -> ScoredPictures:
        """Score the missing pictures and return all scores, which are finite."""
        chunks, total = self.chunks(), len(self.pictures)
        done = total - sum(len(chunk["keys"]) for chunk in chunks)
        name = f"scores of {self.policy}"
        with Progress(name, total, "pictures", done, processes=self._work.size) as progress:
            self._work.run(self._task, chunks, self._keep, lambda chunk: progress.add(len(chunk["keys"])))
        found: dict[str, np.ndarray] = {}
        for scorer in self.scorers:
            if isinstance(scorer, ToolScorer) and self.missing(scorer):
                folder = self.folder / f"{scorer.name}.work"
                folder.mkdir(parents=True, exist_ok=True)
                print(f"{self.policy}: {scorer.name} of {total} pictures", file=sys.stderr, flush=True)
                scores = scorer.score_pictures(self.pictures, self.policy, folder)
                if scores.shape != (total,) or not np.isfinite(scores).all():
                    raise InputError(f"scorer {scorer.name!r} gave no finite number for each of {total} pictures")
                by_key = {key: (float(one),) for key, one in zip(self._keys, scores, strict=True)}
                self.stores[scorer.name].add(by_key)
            rows = np.array([self.stores[scorer.name].scores[key] for key in self._keys], dtype=np.float64)
            found |= dict(zip(scorer.columns, rows.T, strict=True))
        return ScoredPictures(self.policy, self.pictures, found)

    def _keep(self, found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Store the scores of chunks, but for those that a scorer with other settings gave in an earlier run."""
        for name, store in self.stores.items():
            by_model: dict[str | None, dict[str, Scores]] = {}
            for chunk, result in found:
                if chunk["identities"].get(name) == store.identity:
                    scores = zip(chunk["wanted"][name], result["scores"].get(name, []), strict=True)
                    kept = by_model.setdefault(result["models"].get(name), {})
                    kept |= {chunk["keys"][row]: tuple(of_row) for row, of_row in scores}
            for model, of_model in by_model.items():
                if of_model:
                    store.add(of_model, model)


def require_one_model(scorings: Sequence[PictureScoring]) -> None:
    """Check that each server has scored the pictures of all policies with one model; call it when they are scored."""
    known: dict[str, tuple[str, list[Path]]] = {}
    for scoring in scorings:
        for name, store in scoring.stores.items():
            if store.model is not None:
                before, paths = known.setdefault(name, (store.model, []))
                one_model(name, before, store.model, again([*paths, store.path]))
                paths.append(store.path)


def again(paths: Sequence[Path]) -> str:
    """Return what to do for scores of one model."""
    either = " or ".join(map(str, paths))
    return f"delete {either}, and the same command scores those pictures again, or serve the model of the kept scores"
