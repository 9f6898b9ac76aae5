"""Scoring of image lists, decoded in threads ahead of the model; the table of their scores, and a page of it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from latentreward.core.contracts import ImageRef, seen_as, sources_of, sources_wanted, taken_of_edits
from latentreward.core.errors import InputError, first_line, one_line
from latentreward.core.storage.digests import digest, size_and_time
from latentreward.core.storage.durable import check_writable
from latentreward.core.storage.run_folder import load_table
from latentreward.data import ImageError, count_text, decode_image
from latentreward.data.clips import ClipLoader
from latentreward.data.image_lists import ImageList, ListedImage
from latentreward.data.image_sizes import ImageSizes
from latentreward.data.images import MAX_PIXELS, MISSING, ExifOrientation, check_scans, map_ahead, read_header
from latentreward.data.readers.json_rows import short
from latentreward.reward.scoring.ensemble import by_kind
from latentreward.reward.scoring.find import name_of
from latentreward.reward.scoring.reward_model import RewardModel
from latentreward.reward.scoring.scoring_noise import ScoringNoise, timesteps_of

NO_SCORE = "no finite score"  # start of the text in column ``problem`` for an image whose score is NaN or infinite
FOUND = ("seconds", "rotated", "unused")
"""What :class:`ListedScoring` counts: seconds in the model, images with an EXIF orientation other than upright, and
frames of clips that were not used."""


@dataclass(frozen=True)
class Loaded:
    """Decoded image or clip at the model's size, or the reason why it cannot be used."""

    # ``(3, H, W)``, or ``(3, F, H, W)`` for a clip, in [-1, 1]; None if there is a problem
    pixels: Tensor | None = None
    size: tuple[int, int] | None = None  # height and width of the decoded image before resizing
    problem: str | None = None  # reason why the image cannot be used; None if it can
    rotated: bool = False  # whether the image has an EXIF orientation other than upright
    unused: int = 0  # number of frames of a clip that are not used


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
        self.found = dict.fromkeys(FOUND, 0.0)
        self.progress: Callable[[int], None] = lambda number: None  # called with the number of rows just finished

    def table(self, part: range) -> pa.Table:
        """Score the rows of a part.

        Columns are ``image``, ``prompt``, ``score`` and a score for each further level, of a model with two axes
        ``fidelity`` and ``aesthetics`` with the noise of ``score``, ``z_score`` and ``quantile`` of ``score`` (empty
        unless the model is calibrated at that level), ``width`` and ``height`` of the image, and ``problem``: the
        reason why there is no score.

        Raises:
            InputError: If no image of a part at the start of the list has a finite score: then the model is at fault.
        """
        rows = self.rows[part.start : part.stop]
        names = [*self.levels, *self.axes]
        scores = torch.full((len(rows), len(names)), torch.nan)
        problems: list[str | None] = [None] * len(rows)
        sizes: list[tuple[int | None, int | None]] = [(None, None)] * len(rows)
        error: InputError | None = None
        with closing(
            map_ahead(self._load, rows, 2 * self.batch_size + self.decode_threads, self.decode_threads)
        ) as loaded:
            for batch in by_kind(self._readable(rows, loaded, problems, sizes), self.batch_size):
                error = self._score(rows, batch, scores, problems) or error
                self.progress(len(batch))
        if error is not None and part.start == 0 and not scores.isfinite().any():
            raise error from error.__cause__
        calibration, own = self.model.calibration, scores[:, 0]
        calibrated = calibration is not None and calibration.fits(self.levels["score"])
        empty = torch.full_like(own, torch.nan)
        columns = dict(zip(names, scores.unbind(dim=1), strict=True))
        columns["z_score"] = calibration.z_score(own) if calibrated else empty
        columns["quantile"] = calibration.quantile(own) if calibrated else empty
        return pa.table(
            {
                "image": pa.array([row.name for row in rows], pa.string()),
                "prompt": pa.array([row.prompt for row in rows], pa.string()),
                **{name: pa.array(v.float().numpy(), pa.float32(), from_pandas=True) for name, v in columns.items()},
                "width": pa.array([width for _, width in sizes], pa.int32()),
                "height": pa.array([height for height, _ in sizes], pa.int32()),
                "problem": pa.array(problems, pa.string()),
            }
        )

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

    def _readable(
        self, rows: Sequence[ListedImage], loaded: Iterable[Loaded], problems: list[Any], sizes: list[Any]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, Tensor]]]:
        """Yield kind, row and pixels of the images that can be used; fill in ``problems`` and ``sizes`` of the rows.

        Images of one kind have one size, and are edits of equally many pictures.
        """
        for row, image in enumerate(loaded):
            if image.pixels is None:
                problems[row] = image.problem
                self.progress(1)
                continue
            sizes[row] = image.size
            self.found["rotated"] += image.rotated
            self.found["unused"] += image.unused
            yield (len(sources_of(rows[row].prompt)), *image.pixels.shape), (row, image.pixels)

    def _score(
        self, rows: Sequence[ListedImage], images: list[tuple[int, Tensor]], scores: Tensor, problems: list[Any]
    ) -> InputError | None:
        """Score images of one size; if that fails, one by one, to note which images fail; return a failure."""
        try:
            scores[[row for row, _ in images]] = self._call(rows, images)
            return None
        except InputError:
            last = None
            for row, pixels in images:
                try:
                    scores[row] = self._call(rows, [(row, pixels)])[0]
                except InputError as error:
                    unread = isinstance(error, ImageError)  # a picture to edit, which no one decoded before
                    problems[row] = str(error) if unread else f"{NO_SCORE} ({one_line(error)})"
                    last = error
            return last

    def _call(self, rows: Sequence[ListedImage], images: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Score N images of one size under K noise settings; returns ``(N, K)``, with axes ``(N, K + 2)``."""
        start = time.perf_counter()
        pixels = torch.stack([image for _, image in images])
        prompts = [seen_as(rows[row].prompt, max_pixels=self.max_pixels) for row, _ in images]
        different = list(dict.fromkeys(self.levels.values()))
        options: dict[str, Any] = {"batch_size": self.batch_size, "value_range": (-1, 1), "axes": bool(self.axes)}
        outputs = self.model.score_levels(prompts, pixels, different, **options)
        scores = self.model.head.total(outputs)
        self.found["seconds"] += time.perf_counter() - start
        if scores.ndim != 2:
            number = scores.shape[-1]
            raise InputError(f"model: {self.model.source} gives {number} scores per image; choose one that gives one")
        scores = scores[:, [different.index(noise) for noise in self.levels.values()]]
        return torch.cat([scores, outputs[:, different.index(self.levels["score"])]], dim=1) if self.axes else scores


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

    def some(texts: Sequence[str], joined: str) -> str:
        return joined.join(texts[:NAMED]) + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")

    bad = [(row, one) for row, one in zip(listed.rows, table["problem"].to_pylist(), strict=True) if one is not None]
    text = f"{len(listed.rows) - len(bad)} of {len(listed.rows)} images have a score"
    if len(bad) < len(listed.rows):
        text += f", {pc.min(table['score']).as_py():.4f} to {pc.max(table['score']).as_py():.4f}"
    if bad:
        reasons = Counter(problem.partition(" (")[0] for _, problem in bad)
        names = [short(row.name or row.detail.partition(":")[0]) for row, _ in bad]
        text += f"\nwithout a score: {count_text(reasons)}: {some(names, ', ')}"
    return f"{text}\nremarks: {some(listed.remarks, '; ')}" if listed.remarks else text


SIDE, QUALITY = 224, 75
"""Longest side of a thumbnail in pixels, and its JPEG quality: 500 photographs make a page of 4 to 8 MB."""
LISTED = 1000  # largest number of images without a score that the page lists
LEVEL = "score_"  # prefix of the columns with scores at one noise level


class Gallery:
    """HTML file that shows scored images as embedded thumbnails, each with a link to its image file.

    Beside an edit the pictures that were edited are shown.

    Of a list longer than ``limit`` the best and the worst are shown, half each. An image of more than ``max_pixels`` is
    shown without a thumbnail.
    """

    def __init__(self, path: Path, limit: int, threads: int, max_pixels: int) -> None:
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise InputError(f"gallery is {path}; give a file that ends in .html")
        check_writable(path)
        self.path, self.limit, self.threads, self.max_pixels = path, limit, threads, max_pixels

    def write(
        self,
        listed: ImageList,
        table: pa.Table,
        model: str,
        exif: ExifOrientation = "ignore",
        sizes: ImageSizes | None = None,
    ) -> int:
        """Write the page of the images with their ``table`` of scores, and return the number of images on it.

        Thumbnails are turned upright if ``exif`` is ``apply``; a rule ``sizes`` for clips makes thumbnails that play.
        """
        from latentreward.core.reports.page import write_page

        scores = table["score"].to_numpy()
        order = np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())].tolist()
        best = len(order) if len(order) <= self.limit else (self.limit + 1) // 2
        places = [*range(best), *range(max(best, len(order) - self.limit + best), len(order))]
        rows = table.to_pylist()

        def card(place: int) -> dict[str, Any]:
            row, values = listed.rows[order[place]], rows[order[place]]
            levels = {name.removeprefix(LEVEL): value for name, value in values.items() if name.startswith(LEVEL)}
            return {
                **{name: values[name] for name in ("score", "z_score", "quantile")},
                "rank": place + 1,
                "name": row.name,
                "prompt": row.prompt,
                "href": quote_from_bytes(os.fsencode(os.path.relpath(row.path, self.path.parent))),
                "picture": self._picture(row.ref(), exif, sizes),
                "sources": [self._picture(one, exif) for one in sources_of(row.prompt)],
                "levels": [(name.replace("_", " "), value) for name, value in levels.items() if value is not None],
                "size": f"{values['width']} × {values['height']}",
            }

        with ThreadPoolExecutor(self.threads) as pool:
            cards = [*pool.map(card, places)]
        told = ((one.name, row["problem"]) for one, row in zip(listed.rows, rows, strict=True))
        without = [(name, problem) for name, problem in told if problem is not None]
        write_page(
            self.path,
            "gallery",
            title=f"Scores of {name_of(str(listed.source))}",
            model=name_of(model),
            total=len(listed.rows),
            scored=len(order),
            mean=f"{np.nanmean(scores):.4f}" if order else "",
            best=best,
            cards=cards,
            without=without[:LISTED],
            more_without=max(len(without) - LISTED, 0),
        )
        return len(places)

    def _picture(self, image: ImageRef, exif: ExifOrientation, sizes: ImageSizes | None = None) -> str | None:
        """Return a thumbnail as a data URI; None if the image or clip cannot be read any more."""
        from latentreward.core.reports.drawing import clip_uri, picture_uri, to_images

        loader = None if sizes is None else sizes.loader(SIDE, SIDE)
        try:
            if isinstance(loader, ClipLoader):
                clip = replace(loader, max_pixels=self.max_pixels)(image)
                return clip_uri(to_images(clip), loader.fps, SIDE, QUALITY)
            return picture_uri(decode_image(image, self.max_pixels, exif), SIDE, QUALITY)
        except ImageError:
            return None
