"""Pairs streamed from a hub data set or parquet files without a copy, and the data module that trains on them."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import torch

from latentreward.core.contracts import ImageRef, PreferencePair, sources_of, sources_wanted
from latentreward.core.errors import InputError, check_at_least_one, first_line
from latentreward.core.storage.digests import digest
from latentreward.core.storage.hub import is_hub_id
from latentreward.data.datamodules import PreferenceDataModule
from latentreward.data.dataset import LoadedPair, PairDataset, SkippedPair, collate_pairs
from latentreward.data.images import COUNT
from latentreward.data.loading import CountedBatches, ResumableLoader, check_same_order, shares_of
from latentreward.data.readers.base import OnError, normalise_prompt
from latentreward.data.readers.dataset_pairs import KEYS, SOURCE_KEYS, OwnColumns
from latentreward.data.readers.json_rows import SOURCES, short
from latentreward.data.readers.rows import BY_LABEL, PairRowParser, RowReader, WholeNumbersError
from latentreward.data.readers.tables import (
    DAMAGE,
    ParquetPart,
    Source,
    find_parts,
    plain_features,
    set_folder,
    source_name,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

BAD, UNLABELLED, SHARED, UNREAD = "left out by on_error", "unlabelled", "prompt in another split", "images not read"
COUNTED = (BAD, UNLABELLED, SHARED, UNREAD, COUNT)
"""What is counted of the rows that a stream has read."""


class PairStream(RowReader):
    """Source of pairs for :class:`StreamedPreferenceDataModule`, read in their order and never by number.

    Columns and settings are those of :class:`~latentreward.data.DatasetPairReader`, but images must be bytes. A pair
    without ``pair_id`` is named by a hash of its prompt and images. Only the first row is read by the constructor.
    Unlabelled rows are left out, and ``on_error: placeholder`` is as ``skip``, since no row has a number to keep. What
    needs the number of rows takes readers only.

    Args:
        source: Id of a hub data set, in any format that ``datasets`` streams; folder or file of parquet files. From
            Python also an ``IterableDataset``.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        config: Name of the configuration, where the hub data set has several.
        columns: Names of the columns where they differ.
        labels: Meaning of each label; needed for a column of whole numbers.
        shuffle_buffer: Rows, with their images' bytes, that each loader process keeps in memory to draw the next row
            from at random; files are drawn in a random order too. 1 keeps the order of the source.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
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
        self.shuffle_buffer, self._place = shuffle_buffer, source_name(source)
        set_folder(self, source)
        rows = self._open(os.fspath(source) if isinstance(source, os.PathLike) else source, split, revision, config)
        if (first := next(self._guarded(rows), None)) is None:
            raise InputError(f"split: {split!r} of {self._place} has no rows; check the files")
        # Without types, the names alone choose the columns.
        schema = rows.features.arrow_schema if rows.features else pa.schema(dict.fromkeys(first, pa.string()))
        self.own = own = OwnColumns(schema, columns or {}, self._place, self.sources)
        own.embedded = {field for field in (*own.images, SOURCES[0]) if field in own.of}
        for column in (own.of[field] for field in own.images):
            value = first[column]
            if not isinstance(value, dict | bytes | None):
                problem = f"column {column} holds {short(value)}, not an image's bytes"
                raise InputError(f"{self._place}: {problem}; give it the feature Image, or name another one in columns")
        self._rows = rows.select_columns(sorted({*own.of.values()}))
        label = own.of.get("label", "") if own.images == BY_LABEL and labels is None else ""
        if label and pa.types.is_integer(schema.field(label).type):
            raise WholeNumbersError(label)
        # A stream may repeat a pair, and the names of all pairs would be kept for ever.
        self._parser = PairRowParser(self, labels=labels, unique=False)

    def _open(self, source: Any, split: str, revision: str | None, config: str | None) -> "IterableDataset":
        from datasets import IterableDataset, load_dataset  # slow to import

        if isinstance(source, IterableDataset):
            return source.decode(False) if source.features else source
        settings: dict[str, Any] = {"path": source, "name": config, "revision": revision}
        if Path(source).exists() or not is_hub_id(source):
            parts = find_parts(self, source, split, config=config)
            files = [*map(ParquetPart.pattern, parts)]
            settings = {"path": "parquet", "data_files": {split: files}, "features": plain_features(parts[0])}
        try:
            rows = load_dataset(**settings, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            told = f"source: {source!r} cannot be streamed ({first_line(error)}); check id and split"
            raise InputError(told) from error
        return rows.decode(False) if rows.features else rows

    def __len__(self) -> NoReturn:
        raise InputError("PairStream: a stream has no number of rows; train on it in StreamedPreferenceDataModule")

    @property
    def table(self) -> NoReturn:  # type: ignore[override]
        """Raise InputError: all methods of the base class that need all rows at once read this table."""
        self.__len__()

    def pairs(self, part: int, parts: int, seed: int, counted: Callable[[str], None]) -> Iterator[PreferencePair]:
        """Yield the labelled pairs of one of several parts of the stream, once, in a random order.

        A part is as many whole files as every part can have, and every ``parts``-th row of the files that are left
        over, which all parts read. ``counted`` is called with one of ``COUNTED`` for every row that is not yielded.
        """
        from datasets import concatenate_datasets  # slow to import

        files = self._rows.num_shards  # that can be read independently of each other
        own = files // parts
        shards = [self._rows.shard(files, number) for number in range(files)]
        for found, first, step in ((shards[part : own * parts : parts], 0, 1), (shards[own * parts :], part, parts)):
            if not found:
                continue
            rows = concatenate_datasets(found)
            if self.shuffle_buffer > 1:
                rows = rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            for row in islice(self._guarded(rows), first, None, step):
                pair = self._read(row)
                if pair is not None and pair.label_a is not None:
                    yield pair
                else:
                    counted(BAD if pair is None else UNLABELLED)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        return row["images"]

    def find_sources(self, row: dict[str, Any]) -> list[ImageRef]:
        return row["sources"]

    def _read(self, content: Mapping[str, Any]) -> PreferencePair | None:
        """Check a row, applying ``on_error``, and return its pair; None leaves it out."""
        given = {field: content[column] for field, column in self.own.of.items()}
        images = self.embedded_images([given[field] for field in self.own.images], [given.get(key) for key in KEYS])
        sources = self.embedded_images(given.get(SOURCES[0]), given.get(SOURCE_KEYS))
        name = digest([str(given["prompt"]), *(image.data or image.image_key for image in images)])
        parsed = self._parser.parse(name, 0, self.own.read(content))
        return self.make_pair({**parsed[0], "images": images, "sources": sources}) if parsed else None

    def _guarded(self, rows: "IterableDataset") -> Iterator[dict[str, Any]]:
        """Yield the rows of a stream; an error about a damaged file becomes one line.

        ``iter`` is used, because the stream itself would give a loader's worker process only some of the files.
        """
        try:
            for batch in rows.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
        except DAMAGE as error:
            told = f"source: {self._place} cannot be read on ({first_line(error)}); check its files"
            raise InputError(told) from error


class StreamedPairs(PairDataset):
    """Batches of a stream by their number, for one rank; consecutive numbers are read without going back.

    The stream is divided into lanes, one for each rank and loader process. Batch ``n`` of a rank comes from its lane
    ``n`` modulo the number of lanes. A lane goes over its part of the stream again and again, each time in a new order:
    pass ``n`` by ``seed + n``. Pairs of a batch edit equally many pictures: a pair waits in its lane until there are
    enough with as many. Pairs whose normalised prompt is in ``apart`` are left out.
    """

    def __init__(
        self, stream: PairStream, data: PreferenceDataModule, on_error: OnError, batches: int, apart: frozenset[str]
    ) -> None:
        super().__init__(stream, data.loader, (), on_error, "train")
        self.on_error = "skip" if self.on_error == "placeholder" else self.on_error  # no row has a number to keep
        self.stream, self.batches_per_epoch, self.apart = stream, batches, apart
        self.lanes, self.batch_size, self.seed = max(1, data.num_workers), data.batch_size, data.seed
        self.share = {"rank": 0, "num_replicas": 1}
        self._open: dict[int, tuple[Iterator[list[PreferencePair]], int]] = {}  # a lane's batches left, and those taken
        # Of each lane one row, because the processes that read lanes write it.
        self._counts = torch.zeros(self.lanes, len(COUNTED), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.batch_size * self.batches_per_epoch

    def edits(self) -> bool:
        return SOURCES[0] in self.stream.own.of

    def check_sources(self) -> None:
        """Look at nothing: rows of a stream are read once, when they come."""

    def __getitems__(self, numbers: Sequence[int]) -> list[LoadedPair | SkippedPair]:
        """Return the pairs of the batch with the given single number, with their images decoded."""
        (number,) = numbers
        lane, start = number % self.lanes, number // self.lanes
        if lane not in self._open or self._open[lane][1] > start:
            self._open[lane] = self._batches(lane), 0
        rest, taken = self._open[lane]
        self._open[lane] = rest, start + 1
        return [self.load(pair, lane) for pair in next(islice(rest, start - taken, None))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def count(self, place: int, problem: str) -> None:
        self._counts[place, COUNTED.index(problem if problem in COUNTED else UNREAD)] += 1

    def skipped(self) -> Counter[str]:
        """Count, by reason, the rows that this rank has left out; rows that are read again are counted again."""
        return +Counter(dict(zip(COUNTED, self._counts.sum(dim=0).tolist(), strict=True)))

    def _batches(self, lane: int) -> Iterator[list[PreferencePair]]:
        """Yield batches without end, each of pairs with equally many pictures to edit."""
        waiting: dict[int, list[PreferencePair]] = {}
        part, parts = self.share["rank"] * self.lanes + lane, self.share["num_replicas"] * self.lanes
        for number in count():
            yielded = False
            for pair in self.stream.pairs(part, parts, self.seed + number, partial(self.count, lane)):
                pictures = len(sources_of(pair.prompt))
                shared = bool(self.apart) and normalise_prompt(pair.prompt) in self.apart
                # Here, because a batch of pairs with a wrong number of pictures alone would be empty.
                if shared or (self.on_error != "raise" and sources_wanted(pictures, self.taken)):
                    self.count(lane, SHARED if shared else COUNT)
                    continue
                yielded = True
                waiting.setdefault(pictures, []).append(pair)
                if len(waiting[pictures]) == self.batch_size:
                    yield waiting.pop(pictures)
            if not yielded:
                told = f"data.train: no row left in part {part + 1} of {parts} of the stream"
                remedy = "use fewer num_workers or devices, label rows, or set data.shared_prompts: keep"
                raise InputError(f"{told}; {remedy}")


class StreamSampler(CountedBatches):
    """Sampler of the numbers of one rank's batches of a stream, over all epochs.

    An epoch goes on after the last batch of the one before, also if that one was stopped. It begins with the first
    lane, for which a few batches are left out: torch gives every epoch's first batch to its first worker process. The
    order depends on how the stream is divided, so that the state fits only a run of the same settings.
    """

    def __init__(self, dataset: StreamedPairs, num_workers: int, **shares: int) -> None:
        super().__init__(dataset.batch_size, dataset.batches_per_epoch, seed=dataset.seed, **shares)
        self._rounds = -(-dataset.batches_per_epoch // dataset.lanes) * dataset.lanes
        order = {name: getattr(dataset, name) for name in ("batch_size", "batches_per_epoch")}
        order |= {"num_workers": num_workers, "world_size": self.num_replicas}
        self._order = {**order, "shuffle_buffer": dataset.stream.shuffle_buffer}

    def __iter__(self) -> Iterator[list[int]]:
        start = self.epoch * self._rounds + self.batches
        for number in range(self.remaining()):
            self.taken = number + 1
            yield [start + number]

    def state_dict(self, batches: int) -> dict[str, Any]:
        return {**super().state_dict(batches), **self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_same_order(state_dict, **self._order)
        super().load_state_dict(state_dict)


class StreamedPreferenceDataModule(PreferenceDataModule):
    """Pairs to train on from a stream, and readers for the other splits, as :class:`PreferenceDataModule`.

    Nothing is copied to this machine. In return the order is random only within ``shuffle_buffer`` rows and the order
    of the files; an epoch is a number of batches, and goes on where the last one ended. A run that goes on reads the
    stream again up to its place, without decoding images; the same pairs then follow.

    Args:
        size: Side in pixels, or (height, width), of the images that the network takes.
        train: Stream of the pairs to train on.
        batches_per_epoch: Batches per rank in an epoch; sets when validation and epoch checkpoints happen.
        options: Other settings of :class:`PreferenceDataModule`, but for ``frames`` and ``targets``;
            ``shared_prompts: raise`` is as ``drop``.
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
        if options.get("targets") is not None or options.get("frames", 1) != 1:
            raise InputError("data.targets and data.frames need rows with numbers, not a stream; use a reader in train")
        if train is not None:
            on_error: OnError = options.get("on_error", "raise")
            apart = [] if options.get("shared_prompts") == "keep" else [*self.datasets.values()]
            prompts = (prompt for one in apart if one.name != "predict" for prompt in one.reader.prompts())
            shared = frozenset(map(normalise_prompt, prompts))
            self.datasets["train"] = StreamedPairs(train, self, on_error, batches_per_epoch, shared)

    def train_dataloader(self) -> ResumableLoader:
        if getattr(self.trainer, "overfit_batches", 0):
            raise InputError("trainer.overfit_batches: a stream has no fixed batches; use a reader in data.train")
        dataset, shares = self._dataset("train"), shares_of(self.trainer)
        dataset.share = shares
        sampler = StreamSampler(dataset, self.num_workers, **shares)
        return ResumableLoader(dataset, sampler, collate_fn=collate_pairs, **self._worker_settings())
