"""Data set of cached pairs that reads a whole batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from latentreward.core.contracts import Conditioning, PreferenceBatch, map_tensors
from latentreward.data.collate import is_turned, stack_targets
from latentreward.data.image_sizes import ImageSizes, NearestBucket, OneSize
from latentreward.diffusion.cache.buffers import POOLS, BufferPool, Layout, carve, layout_bytes, own_buffer
from latentreward.diffusion.cache.index import CacheIndex
from latentreward.diffusion.cache.layout import LATENTS, POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS


class CachedPairDataset(Dataset[PreferenceBatch]):
    """Map-style data set of cached pairs, which reads each batch from the shards into a single buffer.

    ``__getitems__`` returns complete batches, so a ``DataLoader`` needs :func:`~latentreward.data.loading.as_is` as
    ``collate_fn``. Latents and embeddings keep their stored dtype. Prompts with a mask are padded with zeros to the
    longest of the batch.

    Args:
        index: Index of the cache.
        rows: Indices of the pairs, in the columns of ``index``, that make up the data set.
        with_text: Whether batches hold prompt embeddings, if the cache does.
        targets: ``(len(rows), 2, T, K)`` given values of the images, see
            :meth:`~latentreward.data.ScoreTargets.values`; None for none.

    Attributes:
        pool: Shared memory that batches are read into; None allocates memory for each batch.
        image_sizes: Rule by which images were resized; None if the cache was copied from one that does not say.
        exif: Whether the images were turned upright by their EXIF orientation.
    """

    def __init__(
        self, index: CacheIndex, rows: Sequence[int] | np.ndarray, with_text: bool = True, targets: Tensor | None = None
    ) -> None:
        self.index, self.rows, self.targets = index, np.asarray(rows, dtype=np.int64), targets
        self.with_text = with_text and index.spec.text is not None
        self.pool: BufferPool | None = None
        self.image_sizes: ImageSizes | None = None
        spec, self.exif = index.spec, index.spec.exif
        if spec.resize is not None and spec.size is None:
            self.image_sizes = NearestBucket(spec.buckets, spec.resize)
        elif spec.resize is not None and spec.size is not None:
            self.image_sizes = OneSize(*spec.size, spec.resize, spec.frames, spec.fps)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def taken(self) -> tuple[int, int]:
        """Least and largest number of pictures that pairs edit."""
        numbers = self.sizes()[:, 2]
        return int(numbers.min()), int(numbers.max())

    def sizes(self) -> np.ndarray:
        """Return the height and width of each pair's images in pixels, and its number of sources, ``(N, 3)``."""
        numbers = np.diff(self.index.source_ends)[self.rows]
        return np.column_stack([self.index.image_size[self.index.image_a[self.rows]], numbers])

    def __getitem__(self, numbers: int | Sequence[int]) -> PreferenceBatch:
        """Read a batch of one or several pairs, as a ``DataLoader`` with ``batch_size=None`` requests it."""
        return self.__getitems__([numbers] if isinstance(numbers, int) else numbers)

    def __getitems__(self, numbers: Sequence[int]) -> PreferenceBatch:
        """Read the pairs at the indices ``numbers``, all of one image size and number of sources, as one batch.

        Each pair's images are assigned to chosen and rejected as in :func:`latentreward.data.collate_pairs`.

        Raises:
            InputError: If a shard is damaged.
        """
        index = self.index
        rows = self.rows[np.asarray(numbers)]
        images = np.stack([index.image_a[rows], index.image_b[rows]])
        keys = [index.image_key.take(side).to_pylist() for side in images]
        labels = index.label[rows]
        known, turned = ~np.isnan(labels), []
        for pair, (label, key_a, key_b) in enumerate(zip(labels.tolist(), *keys, strict=True)):
            if is_turned(label if known[pair] else None, key_a, key_b):
                images[:, pair] = images[::-1, pair]
                keys[0][pair], keys[1][pair] = key_b, key_a
                labels[pair] = 1.0 - label
                turned.append(pair)
        targets = None
        if self.targets is not None:
            values = self.targets[list(numbers)]
            values[turned] = values[turned].flip(1)
            targets = stack_targets([*values])
        fields = {
            "pair_ids": tuple(index.pair_id.take(rows).to_pylist()),
            "prompts": tuple(index.prompts_of(rows)),
            "chosen_keys": tuple(keys[0]),
            "rejected_keys": tuple(keys[1]),
            "latent_space": index.spec.latent_space,
            "targets": targets,
        }
        if index.noise is not None:
            sides = (tuple(index.noise.take(side).to_pylist()) for side in images)
            fields["chosen_noise"], fields["rejected_noise"] = sides
        if index.seen:  # the empty prompt is there without pictures
            fields["uncond"] = None
        layout = self.layout(len(rows), int(rows[0]), index.prompt[rows])
        size, in_worker = layout_bytes(layout), get_worker_info() is not None
        slot = self.pool.take(size) if self.pool else None
        if self.pool is None or slot is None:
            buffer = own_buffer(size)
        else:
            buffer = (self.pool.bytes_of if in_worker else self.pool.leased)(slot, size)
        try:
            tensors = carve(buffer, layout)
            self._read(np.concatenate([images, index.sources(rows)]).ravel(), index.prompt[rows], tensors)
        except BaseException:
            if self.pool and slot is not None and in_worker:
                self.pool.free(slot)
            raise
        tensors[-2].numpy()[:] = np.where(known, labels, 0.5)
        tensors[-1].numpy()[:] = np.where(known, index.weight[rows], 0.0)
        if self.pool and slot is not None and in_worker:
            return SlotBatch(**assemble(tensors, fields), parcel=(self.pool.number, slot, layout, fields))
        return PreferenceBatch(**assemble(tensors, fields))

    def layout(self, pairs: int, like: int, prompts: np.ndarray | None = None) -> Layout:
        """Return the shapes and dtypes of the tensors in a batch of ``pairs`` pairs with images as those of ``like``.

        Args:
            pairs: Number of pairs.
            like: Index of a pair in the columns of ``index``.
            prompts: Index of each pair's prompt; None for prompts as long as the longest in the cache.
        """
        index = self.index
        block = index.store.blocks[index.images.shard[index.image_a[like]]][LATENTS]
        images = 2 + len(index.sources(np.array([like])))
        layout: list[tuple[tuple[int, ...], torch.dtype]] = [((images * pairs, *block.shape), block.dtype)]
        if self.with_text:
            blocks = index.store.blocks[index.texts.shard[index.plan.empty_prompt]]
            embeds, pooled = blocks[PROMPT_EMBEDS], blocks.get(POOLED_PROMPT_EMBEDS)
            longest: tuple[int, ...] = ()
            if index.token_ends and prompts is None:
                longest = (max(int(np.diff(ends, prepend=0).max()) for ends in index.token_ends.values()),)
            elif index.token_ends and prompts is not None:
                longest = (max(count for *_, count in index.tokens(np.append(prompts, index.plan.empty_prompt))),)
            layout.append(((pairs + 1, *longest, *embeds.shape), embeds.dtype))
            layout += [] if pooled is None else [((pairs + 1, *pooled.shape), pooled.dtype)]
            layout += [((pairs + 1, *longest), torch.bool)] if longest else []
        return [*layout, ((pairs,), torch.float32), ((pairs,), torch.float32)]

    def _read(self, images: np.ndarray, prompts: np.ndarray, tensors: Sequence[Tensor]) -> None:
        store = self.index.store
        store.read(LATENTS, self.index.images.of(images), tensors[0])
        if self.with_text:
            embeds, pooled, mask = text_tensors(tensors[1:-2])
            prompts = np.append(prompts, self.index.plan.empty_prompt)
            if pooled is not None:
                store.read(POOLED_PROMPT_EMBEDS, self.index.texts.of(prompts), pooled)
            if mask is None:
                store.read(PROMPT_EMBEDS, self.index.texts.of(prompts), embeds)
                return
            for row, (file, start, count) in enumerate(self.index.tokens(prompts)):
                store.read_span(PROMPT_EMBEDS, file, start, embeds[row, :count])
                embeds[row, count:] = 0
                mask[row] = torch.arange(mask.shape[1]) < count


def text_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tell the tensors of a batch's prompts apart: embeddings, pooled vectors, mask; the last two may be missing."""
    embeds, *others = tensors
    mask = others.pop() if others and others[-1].dtype == torch.bool else None
    return embeds, others[0] if others else None, mask


def assemble(tensors: Sequence[Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """Combine the tensors of a batch and its other fields to the arguments of :class:`PreferenceBatch`."""
    latents, *text, label, weight = tensors
    chosen, rejected, *sources = latents.split(len(label))
    fields = {**fields, "chosen": chosen, "rejected": rejected, "label": label, "weight": weight}
    fields["sources"] = tuple(sources)
    if text:
        prompts = Conditioning(*text_tensors(text))
        fields["conditioning"] = map_tensors(prompts, lambda tensor: tensor[:-1]).trimmed()
        fields.setdefault("uncond", map_tensors(prompts, lambda tensor: tensor[-1:]).trimmed())
    return fields


@dataclass(frozen=True)
class SlotBatch(PreferenceBatch):
    """A batch in a slot of shared memory, in the worker that filled the slot.

    Pickling sends ``parcel`` alone, which the training process turns into a :class:`PreferenceBatch` over the slot.
    """

    parcel: tuple[int, int, Layout, dict[str, Any]] = (0, 0, (), {})  # ID of the pool, slot, layout, other fields

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack, self.parcel


def unpack(pool: int, slot: int, layout: Layout, fields: dict[str, Any]) -> PreferenceBatch:
    """Return the batch in a slot of a pool; the slot becomes free when the batch's tensors are deleted."""
    buffer = POOLS[pool].leased(slot, layout_bytes(layout))
    return PreferenceBatch(**assemble(carve(buffer, layout), fields))
