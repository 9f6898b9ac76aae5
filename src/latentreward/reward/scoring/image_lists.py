"""Scoring of image lists, decoded in threads ahead of the model, and the table of their scores."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from latentreward.core.contracts import seen_as, sources_of, sources_wanted, taken_of_edits
from latentreward.core.errors import InputError, first_line, one_line
from latentreward.core.storage.digests import digest, size_and_time
from latentreward.core.storage.run_folder import load_table
from latentreward.data import ImageError, count_text, decode_image
from latentreward.data.clips import ClipLoader
from latentreward.data.image_lists import ImageList, ListedImage
from latentreward.data.images import MAX_PIXELS, MISSING, check_scans, map_ahead, read_header
from latentreward.data.readers.json_rows import short
from latentreward.reward.scoring.reward_model import RewardModel
from latentreward.reward.scoring.scoring_noise import ScoringNoise, timesteps_of

HELD_BATCHES = 4  # number of batches of decoded images that may wait until a batch of one size is full
NO_SCORE = "no finite score"  # start of the text in column ``problem`` for an image whose score is NaN or infinite


@dataclass(frozen=True)
class Loaded:
    """Decoded image or clip at the model's size, or the reason why it cannot be used."""

    # ``(3, H, W)``, or ``(3, F, H, W)`` for a clip, in [-1, 1]; None if there is a problem
    pixels: Tensor | None = None
    size: tuple[int, int] | None = None  # height and width of the decoded image before resizing
    problem: str | None = None  # reason why the image cannot be used; None if it can
    rotated: bool = False  # whether the image has an EXIF orientation other than upright
    unused: int = 0  # number of frames of a clip that are not used


@dataclass
class ScoredRows:
    """Results so far for one part of the list."""

    rows: Sequence[ListedImage]  # N rows of the list
    scores: Tensor  # ``(N, K)`` float32; NaN for a row without a score
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)  # index of a row → height and width of its image
    problems: dict[int, str] = field(default_factory=dict)  # index of a row → reason why the row has no score

    def finished(self) -> list[range]:
        """Return ranges of consecutive rows that have a score or a problem."""
        scored = self.scores.isfinite().all(dim=1).tolist()
        known = groupby(range(len(self.rows)), lambda row: scored[row] or row in self.problems)
        runs = [list(rows) for done, rows in known if done]
        return [range(rows[0], rows[-1] + 1) for rows in runs]


class ListedScoring:
    """Scorer of the rows of an image list.

    The last bits of a score depend on which images share a batch, and so on the other rows of the same part.
    """

    def __init__(
        self,
        model: RewardModel,
        rows: Sequence[ListedImage],  # the whole list
        levels: dict[str, ScoringNoise],  # name of a column → noise setting of its scores; the first name is ``score``
        batch_size: int,  # largest number of images per forward pass
        decode_threads: int,  # that decode images ahead of the model
        max_pixels: int = MAX_PIXELS,  # of an image; a larger one is recorded as unreadable
    ) -> None:
        if model.image_sizes is None:
            raise InputError(f"model: {model.source} has no image_sizes; publish it again with image_sizes set")
        for noise in levels.values():
            timesteps_of(noise, model.backbone.noise_process)
        self.model, self.rows, self.levels, self.axes = model, rows, levels, model.axes
        self.batch_size, self.decode_threads, self.max_pixels = batch_size, decode_threads, max_pixels
        self._sizes = model.image_sizes
        self._taken = taken_of_edits(model.backbone.sources, lambda: any(sources_of(row.prompt) for row in rows))
        self.scored = False  # whether an image has a score, so that a failure counts as the image's, not the model's
        self.seconds = 0.0  # spent in the model so far
        self.rotated = 0  # images so far with an EXIF orientation other than upright
        self.unused = 0  # frames of clips so far that were not used
        self.progress: Callable[[int], None] = lambda number: None  # called with the number of rows just finished

    def tables(self, parts: Sequence[range]) -> Iterator[tuple[range, pa.Table]]:
        """Score the parts one by one; yield each part's range of rows with its table, see :meth:`table`.

        After a Ctrl-C, the rows of the current part that are finished are yielded before KeyboardInterrupt is raised.
        """
        listed = (self.rows[index] for index in chain.from_iterable(parts))
        ahead = 2 * self.batch_size + self.decode_threads
        with closing(map_ahead(self._load, listed, ahead, self.decode_threads)) as loaded:
            for rows in parts:
                empty = torch.full((len(rows), len(self.levels) + len(self.axes)), torch.nan)
                part = ScoredRows(self.rows[rows.start : rows.stop], empty)
                try:
                    self._score(part, islice(loaded, len(rows)))
                except KeyboardInterrupt:
                    table = self.table(part)
                    for done in part.finished():
                        yield range(rows.start + done.start, rows.start + done.stop), table[done.start : done.stop]
                    raise
                yield rows, self.table(part)

    def table(self, part: ScoredRows) -> pa.Table:
        """Convert the results of a part to a table.

        Columns are ``image``, ``prompt``, ``score`` and a score for each further level, of a model with two axes
        ``fidelity`` and ``aesthetics`` with the noise of ``score``, ``z_score`` and ``quantile`` of ``score`` (empty
        unless the model is calibrated at that level), ``width`` and ``height`` of the image, and ``problem``: the
        reason why there is no score.
        """
        rows = range(len(part.rows))
        columns: dict[str, Any] = {
            "image": pa.array([row.name for row in part.rows], pa.string()),
            "prompt": pa.array([row.prompt for row in part.rows], pa.string()),
        }
        columns |= {name: _numbers(part.scores[:, index]) for index, name in enumerate([*self.levels, *self.axes])}
        calibration, own = self.model.calibration, part.scores[:, 0]
        if calibration is not None and calibration.fits(self.levels["score"]):
            columns |= {"z_score": _numbers(calibration.z_score(own)), "quantile": _numbers(calibration.quantile(own))}
        else:
            columns |= dict.fromkeys(("z_score", "quantile"), _numbers(torch.full_like(own, torch.nan)))
        for axis, name in ((1, "width"), (0, "height")):
            sides = [part.sizes[row][axis] if row in part.sizes else None for row in rows]
            columns[name] = pa.array(sides, pa.int32())
        columns["problem"] = pa.array([part.problems.get(row) for row in rows], pa.string())
        return pa.table(columns)

    def _load(self, row: ListedImage) -> Loaded:
        if row.problem is not None:
            return Loaded(problem=f"{row.problem} ({row.detail})")
        sources = sources_of(row.prompt)
        if wanted := sources_wanted(len(sources), self._taken):
            given = f"{len(sources)} source_images"
            edits = "" if sources else " in a list of edits"
            problem = f"wrong number of pictures to edit ({given}; the model takes {wanted}{edits})"
            if wanted == "0":
                problem = f"edit of pictures, but the model judges images made from text alone ({given})"
            return Loaded(problem=problem)
        try:
            for source in sources:
                check_scans(source, self.max_pixels)
            if self._sizes.frames > 1:
                loader = self._sizes.loader(0, 0)
                assert isinstance(loader, ClipLoader)
                clip = replace(loader, max_pixels=self.max_pixels).load(row.ref())
                return Loaded(clip.pixels, clip.size, unused=clip.unused)
            rotated = read_header(row.ref(), self.max_pixels).rotated
            image = decode_image(row.ref(), self.max_pixels, self.model.exif)
        except ImageError as error:  # which names a source
            return Loaded(problem=str(error).removeprefix(f"image {row.name!r}: "))
        size = image.height, image.width
        return Loaded(self._sizes.loader(*size).pixels(image), size, rotated=rotated)

    def _score(self, part: ScoredRows, loaded: Iterable[Loaded]) -> None:
        """Score a part in batches of images of one size, which are edits of equally many pictures.

        Decoded images wait until :data:`HELD_BATCHES` batches are held; then all images of the commonest size are
        scored. The rest is scored at the end of the part.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for row, image in enumerate(loaded):
            if image.pixels is None:
                part.problems[row] = image.problem or ""
                self.progress(1)
                continue
            part.sizes[row] = image.size or (0, 0)
            self.rotated += image.rotated
            self.unused += image.unused
            kind = len(sources_of(part.rows[row].prompt)), *image.pixels.shape
            waiting.setdefault(kind, []).append((row, image.pixels))
            if sum(map(len, waiting.values())) >= HELD_BATCHES * self.batch_size:
                fullest = max(waiting, key=lambda shape: len(waiting[shape]))
                self._score_images(part, waiting.pop(fullest))
        for images in waiting.values():
            self._score_images(part, images)

    def _score_images(self, part: ScoredRows, images: Sequence[tuple[int, Tensor]]) -> None:
        """Score images of one size; if that fails, one by one, to record a problem for each image that fails.

        Raises:
            InputError: If no image has had a score so far, nor has one at the start of the list: then the model is at
                fault, not an image.
        """
        try:
            part.scores[[row for row, _ in images]] = self._call(part, images)
        except InputError:
            problems = {}
            for row, pixels in images:
                try:
                    part.scores[row] = self._call(part, [(row, pixels)])[0]
                    self.scored = True
                except InputError as error:
                    unread = isinstance(error, ImageError)  # a picture to edit, which no one decoded before
                    problems[row] = str(error) if unread else f"{NO_SCORE} ({one_line(error)})"
                    last = error
            if not self.scored and not self._works():
                raise last from last.__cause__
            part.problems.update(problems)  # not before: after a Ctrl-C they would be kept
        self.scored = True
        self.progress(len(images))

    def _works(self) -> bool:
        """Tell whether the model scores any of the first images of the list that can be read.

        Other processes, and runs that go on, have other parts; all of them ask for the same images.
        """
        part = ScoredRows(self.rows, torch.empty(0))
        images = ((row, self._load(listed).pixels) for row, listed in enumerate(self.rows))
        readable = ((row, pixels) for row, pixels in images if pixels is not None)
        for image in islice(readable, HELD_BATCHES * self.batch_size):
            with suppress(InputError):
                self._call(part, [image])
                return True
        return False

    def _call(self, part: ScoredRows, images: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Score N images of one size under K noise settings; returns ``(N, K)``, with axes ``(N, K + 2)``."""
        start = time.perf_counter()
        pixels = torch.stack([image for _, image in images])
        prompts = [seen_as(part.rows[row].prompt, max_pixels=self.max_pixels) for row, _ in images]
        different = list(dict.fromkeys(self.levels.values()))
        options: dict[str, Any] = {"batch_size": self.batch_size, "value_range": (-1, 1), "axes": bool(self.axes)}
        outputs = self.model.score_levels(prompts, pixels, different, **options)
        scores = self.model.head.total(outputs)
        self.seconds += time.perf_counter() - start
        if scores.ndim != 2:
            number = scores.shape[-1]
            raise InputError(f"model: {self.model.source} gives {number} scores per image; choose one that gives one")
        scores = scores[:, [different.index(noise) for noise in self.levels.values()]]
        return torch.cat([scores, outputs[:, different.index(self.levels["score"])]], dim=1) if self.axes else scores


def _numbers(values: Tensor) -> pa.Array:
    return pa.array(values.float().numpy(), pa.float32(), from_pandas=True)


TEXTS, SIDES = ("image", "prompt", "problem"), ("width", "height")
NAMED = 5  # largest number of images without a score, and of remarks, that a summary lists


def require_some(listed: ImageList) -> None:
    """Raise InputError, before a model is loaded, if every image of the list has a problem or lacks its file."""
    if all(row.problem or not Path(row.path).is_file() for row in listed.rows):
        reasons = Counter(row.problem or MISSING for row in listed.rows)
        first = next(row.detail or row.path for row in listed.rows)
        text = f"{count_text(reasons)} ({first})"
        raise InputError(f"images: none of {len(listed.rows)} in {listed.source} can be scored: {text}")


def images_identity(listed: ImageList, with_files: bool = True) -> str:
    """Return a text with a hash of names and prompts, and, unless left out, of file sizes and modification times.

    ``latentreward score`` compares it with that of an interrupted run, which continues only with the same inputs.
    Without the files it is equal for copies on several machines.
    """

    def facts(row: ListedImage) -> str:
        sources = sources_of(row.prompt)
        files = [row.path, *(source.path for source in sources if source.path)] if with_files else []
        keys = (source.image_key for source in sources)
        return repr((row.name, row.prompt, row.problem, *keys, *(size_and_time(Path(file)) for file in files)))

    return f"{len(listed.rows)} images, {digest(map(facts, listed.rows))}"


def read_scores(path: Path) -> pa.Table:
    """Read a ``.csv`` or ``.parquet`` file of scores.

    Columns in :data:`TEXTS` are strings, columns in :data:`SIDES` are int32, all others are float32.
    """
    try:
        table = load_table(path, TEXTS, strings_can_be_null=True, quoted_strings_can_be_null=False)
        kinds = {**dict.fromkeys(TEXTS, pa.string()), **dict.fromkeys(SIDES, pa.int32())}
        return table.cast(pa.schema([(name, kinds.get(name, pa.float32())) for name in table.column_names]))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"output: {path} is damaged ({first_line(error)}); delete it, and it is made anew") from error


def summarise(listed: ImageList, table: pa.Table) -> str:
    """Return a text for the user: number and range of scores, reasons and names of images without one, and remarks."""
    problems = [(row, problem) for row, problem in enumerate(table["problem"].to_pylist()) if problem is not None]
    good = len(listed.rows) - len(problems)
    text = f"{good} of {len(listed.rows)} images have a score"
    if good:
        text += f", {pc.min(table['score']).as_py():.4f} to {pc.max(table['score']).as_py():.4f}"
    if problems:
        reasons = Counter(problem.partition(" (")[0] for _, problem in problems)
        names = [f"{listed.rows[row].name or listed.rows[row].detail.partition(':')[0]}" for row, _ in problems[:NAMED]]
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        text += f"\nwithout a score: {count_text(reasons)}: {', '.join(map(short, names))}{more}"
    if listed.remarks:
        text += f"\nremarks: {'; '.join(listed.remarks[:NAMED])}"
        text += f" and {len(listed.remarks) - NAMED} more" if len(listed.remarks) > NAMED else ""
    return text
