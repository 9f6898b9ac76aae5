"""Pairs streamed from a hub data set or parquet files without a copy, and the data module that trains on them."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import torch
from torch.utils.data import Dataset

from latentreward.core.contracts import ImageRef, PreferencePair, sources_of, sources_wanted
from latentreward.core.errors import InputError, check_at_least_one, first_line
from latentreward.core.storage.digests import digest
from latentreward.core.storage.hub import is_hub_id
from latentreward.data.collate import collate_pairs
from latentreward.data.datamodules import PreferenceDataModule
from latentreward.data.dataset import LoadedPair, SkippedPair, any_prompt, blank_pair, load_sources, refuse_lost
from latentreward.data.image_sizes import OneSize
from latentreward.data.images import COUNT, ImageError, PixelLoader
from latentreward.data.loading import CountedBatches, ResumableLoader, check_same_order, shares_of
from latentreward.data.readers.base import DATA_ON_ERROR, OnError, count_text, normalise_prompt
from latentreward.data.readers.dataset_pairs import KEYS, SOURCE_KEYS, choose_columns
from latentreward.data.readers.json_rows import SOURCES, edit_problem, edit_remark, find_edit_source, short
from latentreward.data.readers.pair_rows import BY_LABEL, WINNER_FIRST, PairRowParser, WholeNumbersError
from latentreward.data.readers.parquet_store import ParquetPart, plain_features
from latentreward.data.readers.rows import RowReader
from latentreward.data.readers.tables import (
    DAMAGE,
    Source,
    class_names,
    find_all_parts,
    name_class,
    set_folder,
    source_name,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)
COUNTED = ("left out by on_error", "unlabelled", "prompt in another split", "images not read", COUNT)
"""What is counted of the rows that a stream has read."""


def files_between(rows: Any, start: int, stop: int) -> list[Any]:
    """Return the files from number ``start`` up to ``stop`` of a streamed data set, as a few data sets of many files.

    ``datasets`` takes minutes to join thousands of data sets of one file.
    """
    files = rows.num_shards
    if start <= 0 and files <= stop:
        return [rows]
    if stop <= 0 or files <= start:
        return []
    first, second = (rows.shard(2, half) for half in range(2))
    middle = first.num_shards
    return files_between(first, start, stop) + files_between(second, start - middle, stop - middle)


class PairStream(RowReader):
    """Source of pairs for :class:`StreamedPreferenceDataModule`, read in their order and never by number.

    The columns are those of :class:`~latentreward.data.DatasetPairReader`, but images must be
    bytes. A pair without ``pair_id`` is named by a hash of its prompt and images. Only the first row is read by the
    constructor; later rows are checked when they are read. Unlabelled rows are left out, and ``on_error: placeholder``
    is as ``skip``, since no row has a number to keep. No code of a data set is run.

    A stream has no number of rows. ``inspect``, ``cache``, ``score-pairs``, ``export-pairs``, ``benchmark`` and the
    splits ``val``, ``test`` and ``predict`` therefore take readers only.

    Args:
        source: Id of a hub data set, in any format that ``datasets`` streams; folder or file of parquet files, as for
            ``DatasetPairReader``. From Python also an ``IterableDataset``.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        config: Name of the configuration, where the hub data set has several.
        columns: Names of the columns where they differ, see ``DatasetPairReader``.
        labels: Meaning of each label, see ``DatasetPairReader``; needed for a column of whole numbers.
        shuffle_buffer: Rows, with their images' bytes, that each loader process keeps in memory to draw the next row
            from at random; files are drawn in a random order too. 1 keeps the order of the source.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.

    Raises:
        InputError: If the source cannot be opened, or its first row lacks a column or has another type.
    """

    def __init__(
        self,
        source: Source,
        split: str = "train",
        *,
        revision: str | None = None,
        config: str | None = None,
        columns: Mapping[str, str] | None = None,
        labels: Mapping[str | int, str | float] | None = None,
        shuffle_buffer: int = 256,
        **options: Any,
    ) -> None:
        check_at_least_one(shuffle_buffer=shuffle_buffer)
        super().__init__(Path(source_name(source)).name, split, **options)
        source = os.fspath(source) if isinstance(source, os.PathLike) else source
        self.shuffle_buffer = shuffle_buffer
        set_folder(self, source)
        self._place = source_name(source)
        rows = self._open(source, split, revision, config)
        first = next(self._guarded(rows), None)
        if first is None:
            raise InputError(f"split: {split!r} of {self._place} has no rows; check the files")
        told = self.skipped + self.remarks
        # Without types, the names alone choose the columns.
        schema = rows.features.arrow_schema if rows.features else pa.schema(dict.fromkeys(first, pa.string()))
        self._columns = choose_columns(schema, columns or {}, self._place, self.sources)
        if (edited := find_edit_source(first, self._columns.values())) is not None:
            if self.sources == "read":
                raise InputError(f"{self._place}: {edit_problem(edited)}, or name it in columns")
            told[edit_remark(edited)] += 1
        if told:  # `report` would need the number of rows
            logger.warning("%s %s: %s", self._place, split, count_text(told))
        self.edits = SOURCES[0] in self._columns
        self._fields = WINNER_FIRST if WINNER_FIRST[0] in self._columns else BY_LABEL
        listed = [*self._fields, SOURCES[0]]
        for column in (self._columns[field] for field in listed if field in self._columns):
            value = first[column]
            if isinstance(value, list) and column == self._columns.get(SOURCES[0]):
                value = value[0] if value else None
            held = value.get("bytes", value) if isinstance(value, dict) else value
            elsewhere = isinstance(value, dict) and held is None and "://" in str(value.get("path"))
            if not isinstance(held, bytes | None) or elsewhere:
                raise InputError(
                    f"{self._place}: column {column} holds {short(value)}, not an image's bytes; give the column "
                    "the feature Image, or name another one in columns"
                )
        self._rows = rows.select_columns(sorted({*self._columns.values()}))
        label = self._columns.get("label", "")
        self._classes = class_names(schema, label)
        read = self._fields == BY_LABEL and self._classes is None and labels is None
        if read and label and pa.types.is_integer(schema.field(label).type):
            raise WholeNumbersError(label)
        self._parser = PairRowParser(self, labels=labels)

    def __len__(self) -> NoReturn:
        """Raise InputError: a stream has no number of rows."""
        raise InputError(
            f"{type(self).__name__}: a stream has no number of rows; read {self._place} by DatasetPairReader, or train "
            "on it in StreamedPreferenceDataModule"
        )

    @property
    def table(self) -> NoReturn:  # type: ignore[override]
        """Raise InputError: all methods of the base class that need all rows at once read this table."""
        self.__len__()

    def pairs(self, part: int, parts: int, seed: int, counted: Callable[[str], None]) -> Iterator[PreferencePair]:
        """Yield the labelled pairs of one of several parts of the stream, once, in a random order.

        A part is as many whole files as every part can have, and every ``parts``-th row of the files that are left
        over, which all parts read. With fewer files than parts these are all files. ``counted`` is called with one of
        ``COUNTED`` for every row that is not yielded.
        """
        for row in self._rows_of(part, parts, seed):
            pair = self._read(row)
            if pair is None:
                counted(COUNTED[0])
            elif pair.label_a is None:
                counted(COUNTED[1])
            else:
                yield pair

    def _rows_of(self, part: int, parts: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part's own files, then its rows of the files left over; see :meth:`pairs`."""
        from datasets import concatenate_datasets  # slow to import

        files = self._rows.num_shards  # that can be read independently of each other
        own = files // parts
        mine = files_between(self._rows.shard(parts, part, contiguous=False), 0, own) if own else []
        for found, first, step in ((mine, 0, 1), (files_between(self._rows, own * parts, files), part, parts)):
            if found:
                rows = concatenate_datasets(found)
                if self.shuffle_buffer > 1:
                    rows = rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
                yield from islice(self._guarded(rows), first, None, step)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return the images of a row that was read."""
        return row["images"]

    def find_sources(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return the pictures to edit of a row that was read."""
        return row["sources"]

    def _read(self, content: Mapping[str, Any]) -> PreferencePair | None:
        """Check a row, applying ``on_error``, and return its pair; None leaves it out."""
        row = {field: content[column] for field, column in self._columns.items()}
        if self._classes is not None:
            row["label"] = name_class(self._classes, row["label"])
        keys = [row.pop(key, None) for key in KEYS]
        values = [row.pop(field) for field in self._fields]
        sources = self.embedded_images(row.pop(SOURCES[0], None), row.pop(SOURCE_KEYS, None))
        images = self.embedded_images(values, keys)
        name = digest([str(row["prompt"]), *(image.data or image.image_key for image in images)])
        # A stream may repeat a pair, and the names of all pairs would be kept for ever.
        parsed = self._parser.parse(name, 0, {**row, **dict.fromkeys(self._fields)}, stream=True)
        return self.make_pair({**parsed[0], "images": images, "sources": sources}) if parsed else None

    def _guarded(self, rows: "IterableDataset") -> Iterator[dict[str, Any]]:
        """Yield the rows of a stream; an error about a damaged file becomes one line.

        ``iter`` is used, because the stream itself would give a loader's worker process only some of the files.
        """
        try:
            for batch in rows.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
        except DAMAGE as error:
            raise InputError(
                f"source: {self._place} cannot be read on ({first_line(error)}); check its files"
            ) from error

    def _open(self, source: Source, split: str, revision: str | None, config: str | None) -> "IterableDataset":
        from datasets import IterableDataset, load_dataset  # slow to import

        if isinstance(source, IterableDataset):
            rows = source
        elif not isinstance(source, str):
            raise InputError(
                f"source is {source_name(source)}; give a hub id, a folder, or an IterableDataset of the library "
                "datasets"
            )
        else:
            settings: dict[str, Any] = {"path": source, "name": config, "revision": revision}
            if Path(source).exists() or not is_hub_id(source):
                parts = find_all_parts(self, source, split, config=config)
                files = [*map(ParquetPart.pattern, parts)]
                settings = {"path": "parquet", "data_files": {split: files}, "features": plain_features(parts[0])}
            try:
                rows = load_dataset(**settings, split=split, streaming=True)
            except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
                raise InputError(
                    f"source: {source!r} cannot be streamed ({first_line(error)}); check id and split"
                ) from error
        return rows.decode(False) if rows.features else rows


class StreamedPairs(Dataset[list[LoadedPair | SkippedPair]]):
    """Batches of a stream by their number, for one rank; consecutive numbers are read without going back.

    The stream is divided into lanes, one for each rank and loader process. Batch ``n`` of a rank comes from its lane
    ``n`` modulo the number of lanes. A lane goes over its part of the stream again and again, each time in a new order.
    Pairs of a batch edit equally many pictures: a pair waits in its lane until there are enough with as many.

    Args:
        stream: Source of the pairs.
        loader: Decodes and resizes one image. Its ``exif`` is replaced by the stream's ``exif``.
        lanes: Lanes per rank.
        batch_size: Pairs per batch.
        batches_per_epoch: Batches in an epoch, for ``len``.
        apart: Normalised prompts of other splits; pairs with them are left out.
        on_error: Default for a stream whose own ``on_error`` is None.
        seed: Seed of the order; pass ``n`` of a lane uses ``seed + n``.

    Attributes:
        share: Rank and world size, as ``{"rank": 0, "num_replicas": 1}``.
        exif: Treatment of EXIF orientation, as the stream has it.
        taken, check_prompt: As those of :class:`~latentreward.data.PairDataset`.
        image_sizes: Rule by which images are resized.
    """

    taken: tuple[int, int | None] = (0, None)
    check_prompt: Callable[[str], None] = staticmethod(any_prompt)
    targets = None
    unused = torch.zeros(0, 2)

    def __init__(
        self,
        stream: PairStream,
        loader: PixelLoader,
        *,
        lanes: int,
        batch_size: int,
        batches_per_epoch: int,
        apart: Iterable[str] = (),
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        self.stream, self.loader = stream, replace(loader, exif=stream.exif)
        self.exif, self.image_sizes = stream.exif, OneSize(loader.height, loader.width, loader.resize)
        self.lanes, self.batch_size, self.batches_per_epoch = lanes, batch_size, batches_per_epoch
        self.apart, self.on_error, self.seed = frozenset(apart), stream.own_on_error or on_error, seed
        self.share = {"rank": 0, "num_replicas": 1}
        self._in_a_row = 0
        self._open: dict[int, tuple[Iterator[list[PreferencePair]], int]] = {}  # a lane's batches left, and those taken
        # Of each lane one row, because the processes that read lanes write it.
        self._counts = torch.zeros(lanes, len(COUNTED), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.batch_size * self.batches_per_epoch

    def edits(self) -> bool:
        """Tell whether the stream has a column of pictures to edit."""
        return self.stream.edits

    def __getitems__(self, numbers: Sequence[int]) -> list[LoadedPair | SkippedPair]:
        """Return the pairs of the batch with the given single number, with their images decoded."""
        (number,) = numbers
        lane, start = number % self.lanes, number // self.lanes
        if lane not in self._open or self._open[lane][1] > start:
            self._open[lane] = self._batches(lane), 0
        rest, taken = self._open[lane]
        self._open[lane] = rest, start + 1
        loaded: list[LoadedPair | SkippedPair] = []
        for pair in next(islice(rest, start - taken, None)):
            try:
                pixels = self.loader(pair.image_a), self.loader(pair.image_b)
                seen, sources = load_sources(self.loader, pair, self.taken, self.check_prompt)
                loaded.append(LoadedPair(seen, *pixels, sources=sources))
            except ImageError as error:
                if self.on_error == "raise":
                    remedy = f"replace the file, or set {DATA_ON_ERROR} to skip"
                    raise ImageError(f"data.train: {pair.pair_id}: {error}; {remedy}", error.problem) from error
                self._counts[lane, COUNTED.index("images not read")] += 1
                self._in_a_row += 1
                refuse_lost(self._in_a_row, f"data.train: {pair.pair_id}", error)
                blank = blank_pair(self.loader, pair, self.taken, error)
                loaded.append(SkippedPair(pair.pair_id, str(error), blank))
            else:
                self._in_a_row = 0
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def skipped(self) -> Counter[str]:
        """Count, by reason, the rows that this rank has left out; rows that are read again are counted again."""
        totals = dict(zip(COUNTED, self._counts.sum(dim=0).tolist(), strict=True))
        return Counter({reason: rows for reason, rows in totals.items() if rows})

    def _batches(self, lane: int) -> Iterator[list[PreferencePair]]:
        """Yield batches without end, each of pairs with equally many pictures to edit."""
        waiting: dict[int, list[PreferencePair]] = {}
        part, parts = self.share["rank"] * self.lanes + lane, self.share["num_replicas"] * self.lanes

        def counted(reason: str) -> None:
            self._counts[lane, COUNTED.index(reason)] += 1

        for number in count():
            yielded = False
            for pair in self.stream.pairs(part, parts, self.seed + number, counted):
                pictures = len(sources_of(pair.prompt))
                if self.apart and normalise_prompt(pair.prompt) in self.apart:
                    counted(COUNTED[2])
                    continue
                # Here, because a batch of such pairs alone would be empty.
                if self.on_error != "raise" and sources_wanted(pictures, self.taken):
                    counted(COUNT)
                    continue
                yielded = True
                batch = waiting.setdefault(pictures, [])
                batch.append(pair)
                if len(batch) == self.batch_size:
                    yield waiting.pop(pictures)
            if not yielded:
                raise InputError(
                    f"data.train: no row left in part {part + 1} of {parts} of the stream; use fewer num_workers or "
                    "devices, label rows, or set data.shared_prompts: keep"
                )


class StreamSampler(CountedBatches):
    """Sampler of the numbers of one rank's batches of a stream, over all epochs.

    A stream cannot be read from another place than its start, and its order depends on how it is divided. The state
    therefore fits only a run with as many ranks and loader processes, and with the same batch size and seed.

    Args:
        dataset: Batches of the stream.
        num_workers: Loader processes per rank, as set.
        shares: Rank and world size.
    """

    def __init__(self, dataset: StreamedPairs, num_workers: int, **shares: int) -> None:
        super().__init__(dataset.batch_size, dataset.batches_per_epoch, seed=dataset.seed, **shares)
        self.used, self._lanes = 0, dataset.lanes
        self._order = {
            "num_workers": num_workers,
            "batch_size": dataset.batch_size,
            "shuffle_buffer": dataset.stream.shuffle_buffer,
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; a new epoch continues after the last batch of the one before, also if that one was stopped.

        A few batches are left out so that it begins with the first lane: torch gives every epoch's first batch to its
        first worker process, which would else read the stream again up to the place of another lane.
        """
        if epoch != self.epoch:
            end = self.used + self.remaining()  # not what was taken: loader processes take some ahead
            self.used = -(-end // self._lanes) * self._lanes
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        self.taken = 0
        for number in range(self.remaining()):
            self.taken = number + 1
            yield [self.used + number]

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the batches used and what determines their order, ``batches`` of the current iteration included."""
        taken = {"used": self.used + batches, "world_size": self.num_replicas, **self._order}
        return {**super().state_dict(batches), **taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the batches used.

        Raises:
            InputError: If the state was saved with another number of ranks, or another setting of the order.
        """
        if (saved := state_dict["world_size"]) != self.num_replicas:
            raise InputError(
                f"trainer.devices: the run has {self.num_replicas} ranks, but had {saved}; a stream goes on with as "
                "many only: use as many devices, or start anew"
            )
        check_same_order(state_dict, **self._order)
        super().load_state_dict(state_dict)
        self.used = state_dict["used"]


class StreamedPreferenceDataModule(PreferenceDataModule):
    """Pairs to train on from a stream, and readers for the other splits, as :class:`PreferenceDataModule`.

    Nothing is copied to this machine. In return the order is random only within ``shuffle_buffer`` rows and the order
    of the files; an epoch is a number of batches, and goes on where the last one ended; the stream is divided among
    the ranks and their loader processes by files; all of them read the files left over, fewer than there are processes,
    and each takes its share of their rows. Files of unlike lengths end a process's pass before others'. A run that goes
    on reads the stream again from its start up to its place, without decoding images, and must have as many
    ranks and ``num_workers`` and the same ``batch_size``, ``shuffle_buffer`` and seed; the same pairs then follow.

    Rows whose prompt is in ``val`` or ``test`` are left out, unless ``shared_prompts`` is ``"keep"``.

    Args:
        size: Side in pixels, or (height, width), of the images that the network takes.
        train: Stream of the pairs to train on.
        batches_per_epoch: Batches per rank in an epoch; sets when validation and epoch checkpoints happen.
        options: Other settings of :class:`PreferenceDataModule`, but for ``frames`` and ``targets``.

    Raises:
        InputError: If a setting is out of range or needs all rows of ``train``.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: PairStream | None = None,
        batches_per_epoch: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        check_at_least_one("data.", batches_per_epoch=batches_per_epoch)
        for setting, plain in (("targets", None), ("frames", 1)):
            if options.get(setting, plain) != plain:
                raise InputError(
                    f"data.{setting} needs rows with numbers, and a stream has none; use a reader in train"
                )
        shared_prompts = options.get("shared_prompts", "drop")
        if shared_prompts == "raise":
            raise InputError("data.shared_prompts: raise needs all prompts of train before training; set drop or keep")
        if train is None:
            return
        others = [dataset.reader for name, dataset in self.datasets.items() if name in ("val", "test")]
        prompts = (prompt for reader in others for prompt in reader.prompts())
        self.datasets["train"] = StreamedPairs(
            train,
            self.loader,
            lanes=max(1, self.num_workers),
            batch_size=self.batch_size,
            batches_per_epoch=batches_per_epoch,
            apart=map(normalise_prompt, prompts) if shared_prompts == "drop" else (),
            on_error=options.get("on_error", "raise"),
            seed=self.seed,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return batches of the stream; every rank gets ``batches_per_epoch`` of them.

        Raises:
            InputError: If ``train`` is not set, or the trainer's ``overfit_batches`` is.
        """
        if getattr(self.trainer, "overfit_batches", 0):
            raise InputError("trainer.overfit_batches: a stream has no fixed batches; use a reader in data.train")
        dataset, shares = self._dataset("train"), shares_of(self.trainer)
        dataset.share = shares
        sampler = StreamSampler(dataset, self.num_workers, **shares)
        return ResumableLoader(dataset, sampler, collate_fn=collate_pairs, **self._worker_settings())
