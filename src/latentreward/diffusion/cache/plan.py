"""Planning of a cache, before encoding: a scan of the reader's rows, and a row of a shard for each image and prompt.

The plan depends on the reader's rows and on the spec alone, not on the number of processes. Tables are written row by
row; memory holds a hash and an index for each image and prompt.
"""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from latentreward.core.contracts import EditPrompt, ImageRef, LatentSpace, PreferencePair, seen_as, sources_of
from latentreward.core.errors import InputError, quoted
from latentreward.core.storage.digests import file_hash
from latentreward.core.storage.durable import replacing, write_file
from latentreward.core.storage.progress import Progress
from latentreward.core.storage.run_folder import first_difference
from latentreward.data import ImageError, PairReader
from latentreward.data.buckets import Bucket
from latentreward.data.dataset import check_edit
from latentreward.data.images import COUNT, DAMAGED, decode_latents, read_header
from latentreward.data.loading import WorkerLoader
from latentreward.diffusion.cache import layout
from latentreward.diffusion.cache.layout import CachePlan, CacheSpec, digest
from latentreward.diffusion.cache.shards import KEPT
from latentreward.diffusion.cache.sizing import ImageSettings

SIDES = 256
"""More images than a pair has: a, b and sources."""
REMEDY = "replace the file, or set the reader's on_error to skip"


@dataclass(frozen=True)
class ScannedRow:
    """Pair in one row of a reader, with the sizes of its images but without their contents."""

    number: int  # index of the row in the reader
    pair: PreferencePair  # pair whose images have keys but no contents
    marks: list[int]  # checksum of the path or bytes of each image, to notice two images of one key
    sizes: tuple[Bucket, ...] | None = None  # in pixels, of a, b and sources; None if not needed, or with a problem
    problem: str | None = None  # why the row has to be left out; None if it can be cached


class RowScan(Dataset[ScannedRow]):
    """Data set of a reader's rows as :class:`ScannedRow`; image headers are read only if sizes are needed, no pixels.

    Args:
        reader: Reader of the pairs.
        images: Settings for the sizes of images, which tell whether sizes are needed.
        check_prompt: Function that raises InputError for a prompt that the text encoder does not take.
        space: Space of the latents, if the reader holds latents instead of images.
    """

    def __init__(
        self, reader: PairReader, images: ImageSettings, space: LatentSpace, check_prompt: Callable[[str], None]
    ) -> None:
        self.reader, self.images, self.space, self.check_prompt = reader, images, space, check_prompt

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> ScannedRow:
        """Scan row ``index``.

        Raises:
            ImageError: If an image's header cannot be read or the text encoder does not take the prompt, and the
                reader's ``on_error`` is ``"raise"``.
        """
        pair = self.reader[index]
        images = [*layout.images_of(pair).values()]
        marks = [crc32((one.data or b"") if one.path is None else os.fsencode(one.path)) for one in images]
        a, b, *sources = (ImageRef(image.image_key, noise=image.noise) for image in images)
        text = EditPrompt(pair.prompt, sources) if sources else pair.prompt
        bare = replace(pair, prompt=text, image_a=a, image_b=b)
        try:
            if pair.image_a.holds == "latents":
                return ScannedRow(index, bare, marks, tuple(map(self._latents_size, images)))
            limit, exif = self.images.max_pixels, self.reader.exif
            check_edit(seen_as(pair.prompt, exif=exif, max_pixels=limit), self.check_prompt)
            if not self.images.needs_headers():
                return ScannedRow(index, bare, marks)
            sizes = tuple(Bucket(*read_header(image, limit, exif)[:2]) for image in images)
            return ScannedRow(index, bare, marks, sizes)
        except ImageError as error:
            if self.reader.on_error == "raise":
                raise ImageError(f"{pair.pair_id}: {error}; {REMEDY}", error.problem) from error
            return ScannedRow(index, bare, marks, problem=error.problem)

    def _latents_size(self, image: ImageRef) -> Bucket:
        *_, height, width = shape = decode_latents(image, self.space.frame_downscale is not None).shape
        size = Bucket(height * self.space.downscale, width * self.space.downscale)
        if shape != self.space.shape(*size, self.images.frames):
            problem = f"shape {shape}, but the latent space has [{self.space}]"
            raise ImageError(f"latents {image.image_key!r}: {problem}; correct encoder.latent_space", DAMAGED)
        return size


ROWS_PER_GROUP = 4096
SAMPLED_ROWS = 16
SCANNED_AT_ONCE = 64
"""Rows that a worker sends together."""
GROUPS = {
    **dict.fromkeys(("size", "buckets", "resize", "cross_bucket", "min_pixels", "frames", "fps"), "images"),
    "exif": "reader",
    **dict.fromkeys(("origin", "vae", "vae_dtype", "latent_space", "posterior", "batch_size", "text"), "encoder"),
}
"""Field of a spec → group of the command's settings that the field comes from."""


class TableWriter:
    """Writer of a parquet file, row by row.

    Args:
        stream: Binary stream to write to.
        schema: Columns of the table.
    """

    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(stream, schema, compression="zstd")
        self._schema, self.count = schema, 0
        self._rows: list[tuple[Any, ...]] = []

    def add(self, *values: Any) -> int:
        """Add a row and return its index."""
        self._rows.append(values)
        self.count += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()
        return self.count - 1

    def close(self) -> None:
        """Write the remaining rows and the footer; to be called while the stream is open, also after an error."""
        try:
            self._flush()
            self._writer.close()
        finally:
            self._writer.is_open = False  # after a failed close, the writer would try again when it is deleted

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._rows = []


class Planner:
    """Planner that assigns every image and prompt to a row of a shard, in the order of the reader's rows.

    Args:
        spec: Settings of the cache.
        images: Settings for the sizes of images.
        tables: Writer of each table, by the table's file name.
        reader: Reader of the rows, for images of one key.
        edits: Whether the images are edits of pictures, which then is so in all pairs.
        check_sources: Function that raises InputError for a number of pictures that the network does not edit.
        seen: Whether the text encoder sees these pictures too.
        noises: Whether the images' table has a column of noises.

    Attributes:
        dropped: Number of rows left out so far, by reason.
    """

    def __init__(
        self,
        spec: CacheSpec,
        images: ImageSettings,
        tables: dict[str, TableWriter],
        reader: PairReader,
        edits: bool,
        check_sources: Callable[[int], None],
        seen: bool = False,
        noises: bool = False,
    ) -> None:
        self.spec, self.images, self.tables, self.reader = spec, images, tables, reader
        self.edits, self.check_sources, self.seen, self.noises = edits, check_sources, seen, noises
        self.dropped: Counter[str] = Counter()
        self._shards: list[tuple[str, str, int | None, int | None]] = []
        self._counts: list[int] = []
        self._open: dict[tuple[str, Any], int] = {}  # kind, and size of images → shard that is not full
        self._begun: Counter[tuple[str, Any]] = Counter()
        self._known: dict[bytes, int] = {}
        self._marks, self._places = array("L"), array("Q")  # of each image; its place is SIDES · row, plus its side
        if spec.text is not None:
            self._prompt("")

    def add(self, row: ScannedRow) -> None:
        """Write the pair of one row, and assign its images and prompt to shards if they are new.

        A row with a problem, or whose images have no size to be cached at, is left out and counted in ``dropped``.

        Raises:
            InputError: If the pair has a number of sources that does not fit, and the reader's ``on_error`` is
                ``"raise"``.
        """
        sizes: tuple[Bucket, Bucket] | str
        if (problem := row.problem or self._sources_problem(row.pair)) is not None:
            sizes = problem
        elif self.spec.vae is None:
            assert row.sizes is not None
            sizes = self.images.sizes_of_latents(*row.sizes)
        else:
            sizes = self.images.sizes_of_pair(*(row.sizes or (None, None))[:2])
        if isinstance(sizes, str):
            self.dropped[sizes] += 1
            return
        pair, prompt = row.pair, self._prompt(row.pair.prompt, row.number)
        known = (getattr(pair, name) for name in ("confidence", "model_a", "model_b", "source", "split"))
        # Sources are resized as the images are, as in training from pixels.
        images = enumerate(layout.images_of(pair).values())
        a, b, *sources = (self._image(image, sizes[side == 1], row, side) for side, image in images)
        self.tables[layout.PAIRS].add(
            pair.pair_id,
            prompt,
            a,
            b,
            pair.label_a,
            pair.weight,
            pair.group_id,
            *(pair.votes or (None, None)),
            *known,
            *([sources] if self.edits else []),
        )

    def _sources_problem(self, pair: PreferencePair) -> str | None:
        number = len(sources_of(pair.prompt))
        try:
            self.check_sources(number)
            if bool(number) != self.edits:
                raise InputError(f"it has {number} sources, unlike other rows; cache edits and other pairs apart")
        except InputError as error:
            if self.reader.on_error == "raise":
                raise InputError(f"reader: {quoted(pair.pair_id)}: {error}, or set its on_error to skip") from error
            return COUNT
        return None

    def finish(self) -> None:
        """Write the table of shards."""
        for shard, count in zip(self._shards, self._counts, strict=True):
            self.tables[layout.SHARDS].add(*shard, count)

    def _place(self, kind: str, size: Bucket | None, most: int) -> tuple[int, int]:
        """Return shard and row of the next image of a size, or prompt, in shards of at most ``most`` rows."""
        shard = self._open.get((kind, size))
        if shard is None or self._counts[shard] == most:
            shard = self._open[kind, size] = len(self._shards)
            number = self._begun[kind, size]
            self._begun[kind, size] += 1
            name = layout.text_name(number) if size is None else layout.latents_name(*size, number, kind)
            self._shards.append((name, kind, *(size or (None, None))))
            self._counts.append(0)
        self._counts[shard] += 1
        return shard, self._counts[shard] - 1

    def _image(self, image: ImageRef, size: Bucket, scanned: ScannedRow, side: int) -> int:
        key, more = image.image_key, [image.noise] if self.noises else []
        # Of sources the network takes the posterior's mode, also where the latents of images are samples.
        is_mode = side >= 2 and self.spec.posterior == "sample"
        kind = layout.SOURCE_LATENTS_FOLDER if is_mode else layout.LATENTS_FOLDER
        name, place = _hash("source" if is_mode else "image", key, *size), SIDES * scanned.number + side
        if name not in self._known:
            shard, row = self._place(kind, size, self.spec.images_per_shard)
            self.tables[layout.SOURCES].add(scanned.number, [*layout.images_of(scanned.pair)][side])
            self._known[name] = self.tables[layout.IMAGES].add(
                key, *size, shard, row, row // self.spec.batch_size, *more
            )
            self._marks.append(scanned.marks[side])
            self._places.append(place)
        number = self._known[name]
        if self._marks[number] != scanned.marks[side]:
            self._refuse_others(key, (self._places[number], place))
        return number

    def _refuse_others(self, key: str, places: Sequence[int]) -> None:
        """Raise InputError if two images with the same ``key`` are not equal byte by byte; else they are one image."""
        pairs = [self.reader[place // SIDES] for place in places]
        sides = [place % SIDES for place in places]
        images = [[*layout.images_of(pair).values()][side] for pair, side in zip(pairs, sides, strict=True)]
        with suppress(OSError):  # of a file that is missing, which the reader's on_error decides about
            first, second = (image.path.read_bytes() if image.data is None else image.data for image in images)
            if first != second:
                files = (f"{ref.path or 'bytes'} (row {pair.pair_id})" for ref, pair in zip(images, pairs, strict=True))
                raise InputError(f"reader: image_key={key!r:.200} is of {' and of '.join(files)}; give each its own")

    def _prompt(self, prompt: str, number: int | None = None) -> int:
        """Return the row of a prompt, which row ``number`` of the reader has."""
        name = _hash("prompt", prompt, *(source.image_key for source in sources_of(prompt) if self.seen))
        if name not in self._known:
            text = self.spec.text
            shard, row = (None, None) if text is None else self._place(layout.TEXT_FOLDER, None, text.prompts_per_shard)
            more = [number] if self.seen else []
            self._known[name] = self.tables[layout.PROMPTS].add(str(prompt), shard, row, *more)
        return self._known[name]


def write_plan(
    folder: Path,
    spec: CacheSpec,
    images: ImageSettings,
    reader: PairReader,
    num_workers: int,
    check_sources: Callable[[int], None],
    seen: bool,
    check_prompt: Callable[[str], None],
) -> CachePlan:
    """Scan and plan all rows of a reader by ``num_workers`` processes, write the tables, and ``plan.json`` last.

    ``check_sources`` and ``seen`` are as those of :class:`Planner`, ``check_prompt`` as that of :class:`RowScan`.

    Raises:
        InputError: If no row can be cached.
    """
    edits = fewest_sources(reader) > 0
    noises = any(image.noise for pair in sampled_pairs(reader) for image in (pair.image_a, pair.image_b))
    with ExitStack() as stack:
        tables = {}
        for name in layout.SCHEMAS:
            partial = stack.enter_context(replacing(folder / name, KEPT))
            tables[name] = TableWriter(
                stack.enter_context(partial.open("xb")), layout.schema_of(name, edits, seen, noises)
            )
            stack.callback(tables[name].close)
        planner = Planner(spec, images, tables, reader, edits, check_sources, seen, noises)
        progress = stack.enter_context(Progress("cache: plan", len(reader), "rows"))
        rows = WorkerLoader(
            RowScan(reader, images, spec.latent_space, check_prompt),
            batch_size=SCANNED_AT_ONCE,
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # else torch draws a seed from the global generator
        )
        for row in chain.from_iterable(rows):
            planner.add(row)
            progress.add()
        if not tables[layout.PAIRS].count:
            reasons = ", ".join(f"{count} {reason}" for reason, count in planner.dropped.most_common())
            raise InputError(f"reader: none of its rows can be cached ({reasons or 'it has none'}); check images")
        planner.finish()
    plan = CachePlan(
        spec=spec,
        data=describe_data(reader),
        tables={name: file_hash(folder / name) for name in layout.SCHEMAS},
        pairs=tables[layout.PAIRS].count,
        images=tables[layout.IMAGES].count,
        prompts=tables[layout.PROMPTS].count,
        dropped=dict(planner.dropped.most_common()),
    )
    write_file(folder / layout.PLAN, plan.to_json(), KEPT)
    return plan


def describe_data(reader: PairReader) -> dict[str, Any]:
    """Describe a reader's data, so that a resumed run can notice other data without reading all rows.

    Returns:
        The reader's class name, number of rows, source, split, and a digest of about 16 rows spread over the data.
    """
    sample = sampled_pairs(reader)
    rows = [
        [p.pair_id, p.prompt, p.image_a.image_key, p.image_b.image_key, p.label_a]
        + [source.image_key for source in sources_of(p.prompt)]
        for p in sample
    ]
    return {
        "reader": type(reader).__name__,
        "rows": len(reader),
        "source": sample[0].source if sample else "",
        "split": sample[0].split if sample else "",
        "sample": digest(rows),
    }


def sampled_pairs(reader: PairReader) -> list[PreferencePair]:
    """Return about 16 pairs that are spread over a reader's data."""
    step = max(1, len(reader) // SAMPLED_ROWS)
    return [reader[index] for index in range(0, len(reader), step)]


def fewest_sources(reader: PairReader) -> int:
    """Return the least number of pictures that sampled pairs of edits have; 0 if no such pair has any."""
    counts = (len(sources_of(pair.prompt)) for pair in sampled_pairs(reader))
    return min(filter(None, counts), default=0)


def check_same(folder: Path, plan: CachePlan, spec: CacheSpec, reader: PairReader) -> None:
    """Check that a cache is resumed with the settings and the data that it was begun with.

    Raises:
        InputError: If a setting or the data differ; the message names the first setting that does.
    """
    begun, now = (
        {f"{GROUPS[name]}.{name}" if name in GROUPS else name: value for name, value in one.record().items()}
        for one in (plan.spec, spec)
    )
    if difference := first_difference({**begun, "data": plan.data}, {**now, "data": describe_data(reader)}):
        raise InputError(f"{folder} was begun with {difference}; set it back, or choose another output")


def _hash(*parts: Any) -> bytes:
    return blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
