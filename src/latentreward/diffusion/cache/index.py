"""The tables of a cache in memory: its pairs, and the shard and row of their latents and embeddings."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from latentreward.core.contracts import EditPrompt, ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import check_hash
from latentreward.core.storage.progress import Progress
from latentreward.data import PairReader
from latentreward.diffusion.cache import layout
from latentreward.diffusion.cache.check import THREADS, Shard, check_shard
from latentreward.diffusion.cache.layout import CacheSpec, manifest_name, read_plan
from latentreward.diffusion.cache.shards import REMEDY, ShardStore, read_lengths

logger = logging.getLogger(__name__)

OnMissing = Literal["raise", "skip"]
UNREADABLE = "unreadable image"
TWO_SIZES = "images of two sizes"
"""Reasons why a pair cannot be used."""


class Places:
    """Shard and row in the shard of each image or prompt; the shard is -1 if the image or prompt is not stored.

    Args:
        table: Table with the columns ``shard`` and ``row``.
        file_of_shard: Index of each shard's file, -1 for a missing shard; ``shard`` becomes that index.
    """

    def __init__(self, table: pa.Table, file_of_shard: np.ndarray) -> None:
        shard, self.row = (table[name].fill_null(-1).to_numpy().astype(np.int32) for name in ("shard", "row"))
        self.shard = np.append(file_of_shard, -1).astype(np.int32)[shard]

    def of(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """Return the (shard, row) of each image or prompt at the indices ``numbers``."""
        return list(zip(self.shard[numbers].tolist(), self.row[numbers].tolist(), strict=True))


class CacheIndex:
    """Tables and shards of a cache folder, opened once and shared by all data sets that read from the cache.

    The columns hold P pairs, I images and T prompts of the whole plan, also those of missing shards.

    Args:
        folder: Folder of the cache.
        on_missing: ``"raise"`` raises InputError if a shard was not written. ``"skip"`` logs a warning, and
            :attr:`unusable` marks the pairs that need a missing shard; InputError if no shard was written at all.

    Attributes:
        plan: Plan of the cache.
        store: Files of the shards that were written.
        pair_id: P pair IDs; forked workers share its bytes, whereas a list of texts would be copied in each worker.
        prompt: ``(P,)`` index of each pair's prompt in ``prompts``.
        image_a: ``(P,)`` index of each pair's first image in ``image_key``, ``image_size`` and ``images``.
        image_b: ``(P,)`` index of each pair's second image.
        source_images: ``(S,)`` index of each picture that the images are edits of, one pair after the other.
        source_ends: ``(P + 1,)`` 0, then the index in ``source_images`` after the last source of each pair.
        label: ``(P,)`` probability that the first image wins; NaN for unlabelled pairs.
        weight: ``(P,)`` weight of each pair in the loss.
        split: ``(P,)`` name of the split of each pair.
        image_key: I image keys.
        noise: I names of the noises that images were generated from; None if no image has one.
        image_size: ``(I, 2)`` height and width in pixels, as encoded.
        images: Shard and row of each image's latents; ``shard`` is an index of the files in ``store``.
        prompts: T prompts.
        seen: Whether the text encoder saw the pictures that are edited, so that a text with others is another prompt.
        texts: Shard and row of each prompt's embeddings, as in ``images``.
        token_ends: Index after the last token of each prompt in a shard, by the shard's index in ``store``; empty
            unless the text encoder has a mask.

    Raises:
        InputError: If the plan or a table is missing or damaged, the cache has an unknown version, or a shard is
            missing (see ``on_missing``), damaged or of another plan.
    """

    def __init__(self, folder: Path, on_missing: OnMissing = "raise") -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        columns = ["pair_id", "prompt", "image_a", "image_b", "label_a", "weight", "split", layout.SOURCE_IMAGES.name]
        pairs = self._table(layout.PAIRS, columns)
        images = self._table(layout.IMAGES, ["image_key", "height", "width", "shard", "row", layout.NOISE.name])
        prompts = self._table(layout.PROMPTS, ["prompt", "shard", "row", layout.READER_ROW.name])
        self.seen = layout.READER_ROW.name in prompts.column_names
        rows = self._table(layout.SHARDS, ["name", "kind", "height", "width", "count"])
        texts = (pairs["pair_id"], images["image_key"], prompts["prompt"])
        self.pair_id, self.image_key, self.prompts = (text.cast(pa.large_string()).combine_chunks() for text in texts)
        known = layout.NOISE.name in images.column_names
        self.noise = images[layout.NOISE.name].combine_chunks() if known else None
        self.prompt, self.image_a, self.image_b = (pairs[name].to_numpy() for name in ("prompt", "image_a", "image_b"))
        self.source_images, counts = np.zeros(0, np.int64), np.zeros(len(pairs), np.int64)
        if layout.SOURCE_IMAGES.name in pairs.column_names:
            sources = pairs[layout.SOURCE_IMAGES.name].combine_chunks()
            self.source_images, counts = sources.flatten().to_numpy(), sources.value_lengths().to_numpy()
        self.source_ends = np.append(0, counts.cumsum())
        self.label, self.weight = (pairs[name].to_numpy().astype(np.float64) for name in ("label_a", "weight"))
        self.split = pairs["split"].combine_chunks().dictionary_encode()
        self.image_size = np.stack([images[name].to_numpy() for name in ("height", "width")], axis=1).astype(np.int32)
        shards = [Shard(number, **row) for number, row in enumerate(rows.to_pylist())]
        names = [shard.name for shard in shards]
        present = [all((self.folder / file).is_file() for file in (name, manifest_name(name))) for name in names]
        missing = [name for name, there in zip(names, present, strict=True) if not there]
        if missing:
            summary = f"cache {self.folder}: {len(missing)} of {len(shards)} shards are not written, first {missing[0]}"
            if on_missing == "raise" or not any(present):
                skip = ", or set data.on_missing: skip" if any(present) else ""
                raise InputError(f"{summary}; run `latentreward cache` to the end{skip}")
            logger.warning("%s; pairs that need them are left out", summary)
        written = [shard for shard, there in zip(shards, present, strict=True) if there]
        self.store = ShardStore([self.folder / shard.name for shard in written])
        self.token_ends: dict[int, np.ndarray] = {}
        self._sha256: list[str] = []
        unreadable, text = [], self.spec.text
        for number, shard in enumerate(written):
            blocks = self.store.blocks[number]
            try:
                manifest = check_shard(self.folder, self.plan, shard, blocks)
            except InputError as error:
                raise InputError(f"cache {self.folder}: {error}; {REMEDY}") from error
            if text is not None and text.masked and shard.kind == "text":
                self.token_ends[number] = read_lengths(self.store.paths[number], blocks, text.num_tokens).cumsum()
            unreadable += [(number, row) for row in manifest.unreadable]
            self._sha256.append(manifest.sha256)
        # File and row, ``(n, 2)``, of the images that could not be read when the cache was written.
        self._unreadable = np.array(unreadable, dtype=np.int64).reshape(-1, 2)
        file_of_shard = np.where(present, np.cumsum(present) - 1, -1)  # -1 for a missing shard
        self.images = Places(images, file_of_shard)
        self.texts = Places(prompts, file_of_shard)

    @property
    def spec(self) -> CacheSpec:
        """Settings that the cache was written with."""
        return self.plan.spec

    def __len__(self) -> int:
        return len(self.pair_id)

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices ``(n, len(rows))`` of the pictures that pairs are edits of, of which each has n."""
        firsts, lasts = self.source_ends[rows], self.source_ends[rows + 1]
        return self.source_images[firsts + np.arange(int(lasts[0] - firsts[0]))[:, None]]

    def prompts_of(self, rows: np.ndarray) -> list[str]:
        """Return the prompts of pairs; those of edits have the keys of the pictures that are edited."""
        texts: list[str] = self.prompts.take(self.prompt[rows]).to_pylist()
        if not len(self.source_images):
            return texts
        spans = zip(self.source_ends[rows], self.source_ends[rows + 1], strict=True)
        keys = (self.image_key.take(self.source_images[first:last]).to_pylist() for first, last in spans)
        return [EditPrompt(text, list(map(ImageRef, names))) for text, names in zip(texts, keys, strict=True)]

    def _table(self, name: str, columns: list[str]) -> pa.Table:
        path = (self.folder / name).absolute()
        try:
            known = parquet.read_schema(check_hash(path, self.plan.tables.get(name), REMEDY)).names
            return parquet.read_table(path, columns=[column for column in columns if column in known])
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; {REMEDY}") from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); {REMEDY}") from error

    def check_shards(self) -> None:
        """Compare every shard with the checksum in its manifest, which reads the whole cache once.

        Raises:
            InputError: If a shard is damaged.
        """
        paths = self.store.paths
        with ThreadPoolExecutor(THREADS) as pool, Progress("cache: checksums", len(paths), "shards") as progress:
            for _ in pool.map(lambda path, sha256: check_hash(path, sha256, REMEDY), paths, self._sha256):
                progress.add()

    def tokens(self, prompts: np.ndarray) -> list[tuple[int, int, int]]:
        """Return the file, the first token in it and the number of tokens of each of the prompts ``prompts``.

        Only for a text encoder with a mask.
        """
        spans = []
        for file, row in self.texts.of(prompts):
            start = int(self.token_ends[file][row - 1]) if row else 0
            spans.append((file, start, int(self.token_ends[file][row]) - start))
        return spans

    @cached_property
    def unusable(self) -> dict[str, np.ndarray]:
        """Masks ``(P,)`` bool of the pairs that cannot be used, by reason; a pair has at most one reason."""
        unreadable = np.zeros(len(self.image_size), dtype=bool)
        if len(self._unreadable):
            stride = 1 + max(self.images.row.max(), self._unreadable[:, 1].max())
            bad = self._unreadable[:, 0] * stride + self._unreadable[:, 1]
            unreadable = np.isin(self.images.shard.astype(np.int64) * stride + self.images.row, bad)
        missing = self._any(self.images.shard < 0)
        if self.spec.text is not None:
            # Every batch also reads the empty prompt.
            missing |= (self.texts.shard[self.prompt] < 0) | (self.texts.shard[self.plan.empty_prompt] < 0)
        broken = self._any(unreadable) & ~missing
        uneven = (self.image_size[self.image_a] != self.image_size[self.image_b]).any(axis=1)
        return {"shard not written yet": missing, UNREADABLE: broken, TWO_SIZES: uneven & ~missing & ~broken}

    def _any(self, images: np.ndarray) -> np.ndarray:
        """Return whether each pair has an image or source for which ``images`` ``(I,)`` is true, ``(P,)`` bool."""
        found: np.ndarray = images[self.image_a] | images[self.image_b]
        found[np.repeat(np.arange(len(self)), np.diff(self.source_ends))[images[self.source_images]]] = True
        return found

    def splits(self) -> list[str]:
        """List the names of the splits, in the order of their first pair."""
        return self.split.dictionary.to_pylist()


class CachedPairs(PairReader):
    """Reader of the usable pairs of a cache, or of one split of the cache, without their latents.

    Latents are read per batch by :class:`~latentreward.diffusion.cache.dataset.CachedPairDataset`.

    Args:
        index: Index of the cache.
        split: Value of the pairs' ``split`` column; None takes all pairs.

    Attributes:
        rows: ``(N,)`` index of each pair in the columns of ``index``, ascending.

    Raises:
        InputError: If the cache has no such split.
    """

    holds = "nothing"

    def __init__(self, index: CacheIndex, split: str | None = None) -> None:
        super().__init__(on_error="skip")
        self.index = index
        chosen = np.ones(len(index), dtype=bool)
        if split is not None:
            if split not in index.splits():
                raise InputError(
                    f"cache {index.folder} has no split {split!r}; it has {', '.join(map(repr, index.splits()))}"
                )
            chosen = index.split.indices.to_numpy() == index.splits().index(split)
        lost = {reason: int((mask & chosen).sum()) for reason, mask in index.unusable.items()}
        self.skipped.update({reason: count for reason, count in lost.items() if count})
        for mask in index.unusable.values():
            chosen &= ~mask
        self.rows = np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PreferencePair:
        """Return pair ``number``, with the images' keys but not their contents."""
        index, row = self.index, int(self.rows[number])
        label = None if np.isnan(index.label[row]) else float(index.label[row])
        return PreferencePair(
            pair_id=index.pair_id[row].as_py(),
            prompt=index.prompts_of(self.rows[[number]])[0],
            image_a=ImageRef(index.image_key[int(index.image_a[row])].as_py()),
            image_b=ImageRef(index.image_key[int(index.image_b[row])].as_py()),
            label_a=label,
            weight=float(index.weight[row]),
        )

    def labels(self) -> np.ndarray:
        return self.index.label[self.rows]

    def prompts(self) -> list[str]:
        if len(self.index.source_images):
            return self.index.prompts_of(self.rows)
        texts = self.index.prompts.to_pylist()  # pairs with one prompt share its text
        return [texts[place] for place in self.index.prompt[self.rows].tolist()]

    def pair_ids(self) -> list[str]:
        return self.index.pair_id.take(self.rows).to_pylist()
