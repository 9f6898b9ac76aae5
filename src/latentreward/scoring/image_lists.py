"""Rows of an image list through a reward model: decoded ahead in threads, scored in batches of one size."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentreward.data.ahead import map_ahead
from latentreward.data.image_lists import ListedImage
from latentreward.data.images import MAX_PIXELS, ImageError, decode_image, read_header
from latentreward.errors import InputError, one_line
from latentreward.scoring import RewardModel, ScoringNoise

HELD_BATCHES = 4
"""Batches of decoded images that wait for others of their size."""
NO_SCORE = "no finite score"


@dataclass(frozen=True)
class Loaded:
    """An image at the model's size, or why there is none.

    Attributes:
        pixels: ``(3, H, W)`` in [-1, 1].
        size: Height and width of the image, as it is decoded.
        problem: Why it cannot be used.
        rotated: Whether it has an EXIF orientation other than upright.
    """

    pixels: Tensor | None = None
    size: tuple[int, int] | None = None
    problem: str | None = None
    rotated: bool = False


@dataclass
class ScoredRows:
    """What is known of some rows.

    Attributes:
        rows: The rows.
        scores: ``(rows, K)`` float32, NaN where there is none.
        sizes: Height and width by row.
        problems: Why a row has no score.
    """

    rows: Sequence[ListedImage]
    scores: Tensor
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)

    def finished(self) -> list[range]:
        """Runs of rows that have a score, or a reason why there is none."""
        scored = self.scores.isfinite().all(dim=1).tolist()
        known = groupby(range(len(self.rows)), lambda row: scored[row] or row in self.problems)
        runs = [list(rows) for done, rows in known if done]
        return [range(rows[0], rows[-1] + 1) for rows in runs]


class ListedScoring:
    """Scores the rows of an image list.

    What a row gets depends on the rows scored in the same part, by the last bits alone: which images share a batch.

    Args:
        model: Loaded model.
        rows: All rows of the list.
        levels: Settings of noise, by the name of their column; the first is ``score``.
        batch_size: Images per pass.
        decode_threads: Threads that decode ahead.
        max_pixels: Images with more are recorded as unreadable.

    Attributes:
        seconds: Time spent in the model.
        rotated: Images with an EXIF orientation other than upright.
        progress: Called with the number of rows that were finished.

    Raises:
        InputError: If the model does not tell its image size, or a level lies outside its noise process.
    """

    def __init__(
        self,
        model: RewardModel,
        rows: Sequence[ListedImage],
        levels: dict[str, ScoringNoise],
        batch_size: int,
        decode_threads: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        from latentreward.scoring.scoring_noise import timesteps_of

        if model.image_sizes is None:
            raise InputError(
                f"model: {model.source} does not tell the size of its images; publish it again with image_sizes set"
            )
        for noise in levels.values():
            timesteps_of(noise, model.backbone.noise_process)
        self.model, self.rows, self.levels = model, rows, levels
        self.batch_size, self.decode_threads, self.max_pixels = batch_size, decode_threads, max_pixels
        self._sizes = model.image_sizes
        self._scored = False
        self.seconds, self.rotated = 0.0, 0
        self.progress: Callable[[int], None] = lambda number: None

    def tables(self, parts: Sequence[range]) -> Iterator[tuple[range, pa.Table]]:
        """Yield rows of each part with their table, see :meth:`table`; at Ctrl-C, those that are scored already."""
        listed = (self.rows[place] for place in chain.from_iterable(parts))
        ahead = 2 * self.batch_size + self.decode_threads
        with closing(map_ahead(self._load, listed, ahead, self.decode_threads)) as loaded:
            for rows in parts:
                part = ScoredRows(
                    self.rows[rows.start : rows.stop], torch.full((len(rows), len(self.levels)), torch.nan)
                )
                try:
                    self._score(part, islice(loaded, len(rows)))
                except KeyboardInterrupt:
                    table = self.table(part)
                    for done in part.finished():
                        yield range(rows.start + done.start, rows.start + done.stop), table[done.start : done.stop]
                    raise
                yield rows, self.table(part)

    def table(self, part: ScoredRows) -> pa.Table:
        """The table of a part.

        Columns are ``image``, ``prompt``, a score for each level, of which the first is ``score``, ``z_score`` and
        ``quantile`` (empty unless the model is calibrated at that level), ``width`` and ``height`` of the image,
        and ``problem``: why there is no score.
        """
        rows = range(len(part.rows))
        columns: dict[str, Any] = {
            "image": pa.array([row.name for row in part.rows], pa.string()),
            "prompt": pa.array([row.prompt for row in part.rows], pa.string()),
        }
        columns |= {name: _numbers(part.scores[:, place]) for place, name in enumerate(self.levels)}
        columns |= self._calibrated(part.scores[:, 0])
        for axis, name in ((1, "width"), (0, "height")):
            sides = [part.sizes[row][axis] if row in part.sizes else None for row in rows]
            columns[name] = pa.array(sides, pa.int32())
        columns["problem"] = pa.array([part.problems.get(row) for row in rows], pa.string())
        return pa.table(columns)

    def _calibrated(self, scores: Tensor) -> dict[str, pa.Array]:
        calibration, noise = self.model.calibration, self.levels["score"]
        if calibration is None or not calibration.fits(noise):
            return {name: _numbers(torch.full_like(scores, torch.nan)) for name in ("z_score", "quantile")}
        return {"z_score": _numbers(calibration.z_score(scores)), "quantile": _numbers(calibration.quantile(scores))}

    def _load(self, row: ListedImage) -> Loaded:
        if row.problem is not None:
            return Loaded(problem=f"{row.problem} ({row.detail})")
        try:
            rotated = read_header(row.ref(), self.max_pixels).rotated
            image = decode_image(row.ref(), self.max_pixels, self.model.exif)
        except ImageError as error:
            return Loaded(problem=str(error).removeprefix(f"image {row.name!r}: "))
        size = image.height, image.width
        return Loaded(self._sizes.loader(*size).pixels(image), size, rotated=rotated)

    def _score(self, part: ScoredRows, loaded: Iterable[Loaded]) -> None:
        """Score a part; images wait for others of their size, the commonest of which go first when many wait."""
        waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for row, image in enumerate(loaded):
            if image.pixels is None:
                part.problems[row] = image.problem or ""
                self.progress(1)
                continue
            part.sizes[row] = image.size or (0, 0)
            self.rotated += image.rotated
            waiting.setdefault(tuple(image.pixels.shape), []).append((row, image.pixels))
            if sum(map(len, waiting.values())) >= HELD_BATCHES * self.batch_size:
                fullest = max(waiting, key=lambda shape: len(waiting[shape]))
                self._score_images(part, waiting.pop(fullest))
        for images in waiting.values():
            self._score_images(part, images)

    def _score_images(self, part: ScoredRows, images: Sequence[tuple[int, Tensor]]) -> None:
        rows = [row for row, _ in images]
        try:
            part.scores[rows] = self._call(part, images)
        except InputError:
            self._score_singly(part, images)
        self._scored = True
        self.progress(len(images))

    def _score_singly(self, part: ScoredRows, images: Sequence[tuple[int, Tensor]]) -> None:
        """One image had no finite score, which must not cost the others theirs; before any had one, it is fatal."""
        for row, pixels in images:
            try:
                part.scores[row] = self._call(part, [(row, pixels)])[0]
                self._scored = True
            except InputError as error:
                part.problems[row] = f"{NO_SCORE} ({one_line(error)})"
                last = error
        if not self._scored:
            raise last

    def _call(self, part: ScoredRows, images: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Scores ``(N, K)`` of images of one size."""
        start = time.perf_counter()
        pixels = torch.stack([image for _, image in images])
        prompts = [part.rows[row].prompt for row, _ in images]
        different = list(dict.fromkeys(self.levels.values()))
        scores = self.model.score_levels(prompts, pixels, different, batch_size=self.batch_size, value_range=(-1, 1))
        self.seconds += time.perf_counter() - start
        if scores.ndim != 2:
            raise InputError(
                f"model: {self.model.source} gives {scores.shape[-1]} scores of an image; take one with one"
            )
        return scores[:, [different.index(noise) for noise in self.levels.values()]]


def _numbers(values: Tensor) -> pa.Array:
    return pa.array(values.float().numpy(), pa.float32(), from_pandas=True)
