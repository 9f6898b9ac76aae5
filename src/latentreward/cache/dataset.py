"""Cached pairs, a whole batch at a time."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentreward.cache.index import CacheIndex
from latentreward.cache.layout import LATENTS, POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS
from latentreward.cache.store import aligned, batch_buffer
from latentreward.contracts import Conditioning, PreferenceBatch
from latentreward.data.collate import is_turned


class CachedPairDataset(Dataset[PreferenceBatch]):
    """Map-style data set whose batches are read from the shards straight into one buffer.

    A ``DataLoader`` gets whole batches from ``__getitems__``, so give it :func:`as_is` as ``collate_fn``. Latents and
    embeddings keep the dtype they are stored in. In a loader's worker the buffer lies in shared memory, so nothing is
    copied on the way to the trainer.

    Args:
        index: The cache.
        rows: Rows of the index to offer.
        with_text: Whether batches bring prompt embeddings, where the cache holds them.
    """

    def __init__(self, index: CacheIndex, rows: Sequence[int] | np.ndarray, with_text: bool = True) -> None:
        self.index, self.rows = index, np.asarray(rows, dtype=np.int64)
        self.with_text = with_text and index.spec.text is not None

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self) -> np.ndarray:
        """``(N, 2)``: height and width of each pair's images, in pixels."""
        return self.index.image_size[self.index.image_a[self.rows]]

    def __getitem__(self, numbers: int | Sequence[int]) -> PreferenceBatch:
        """A batch of one pair, or of several: what a ``DataLoader`` with ``batch_size=None`` asks for."""
        return self.__getitems__([numbers] if isinstance(numbers, int) else numbers)

    def __getitems__(self, numbers: Sequence[int]) -> PreferenceBatch:
        """The pairs ``numbers``, all of one image size, turned as :func:`latentreward.data.collate.collate_pairs` does.

        Raises:
            InputError: If a shard is damaged.
        """
        index = self.index
        rows = self.rows[np.asarray(numbers)]
        images = np.stack([index.image_a[rows], index.image_b[rows]])
        keys = [[index.image_key[image] for image in side] for side in images.tolist()]
        labels = [None if math.isnan(label) else label for label in index.label[rows].tolist()]
        for pair, (label, key_a, key_b) in enumerate(zip(labels, *keys, strict=True)):
            if is_turned(label, key_a, key_b):
                images[:, pair] = images[::-1, pair]
                keys[0][pair], keys[1][pair] = key_b, key_a
                labels[pair] = None if label is None else 1.0 - label
        latents, conditioning, uncond, label, weight = self._read(images.ravel(), index.prompt[rows])
        label[:] = torch.tensor([0.5 if known is None else known for known in labels])
        weight[:] = torch.from_numpy(np.where(np.isnan(index.label[rows]), 0.0, index.weight[rows]))
        chosen, rejected = latents.chunk(2)
        return PreferenceBatch(
            pair_ids=tuple(index.pair_id[row] for row in rows.tolist()),
            prompts=tuple(index.prompts[prompt] for prompt in index.prompt[rows].tolist()),
            chosen=chosen,
            rejected=rejected,
            chosen_keys=tuple(keys[0]),
            rejected_keys=tuple(keys[1]),
            label=label,
            weight=weight,
            latent_space=index.spec.latent_space,
            conditioning=conditioning,
            uncond=uncond,
        )

    def _read(
        self, images: np.ndarray, prompts: np.ndarray
    ) -> tuple[Tensor, Conditioning | None, Conditioning | None, Tensor, Tensor]:
        """Latents of ``images``, embeddings of ``prompts`` and of the empty prompt, room for labels and for weights."""
        store, pairs = self.index.store, len(prompts)
        places = [self.index.images.of(images)]
        names = [LATENTS]
        if self.with_text:
            texts = self.index.texts.of(np.append(prompts, self.index.plan.empty_prompt))
            places, names = [*places, texts, texts], [*names, PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS]
        blocks = [store.blocks[where[0][0]][name] for where, name in zip(places, names, strict=True)]
        layout = [((len(where), *block.shape), block.dtype) for where, block in zip(places, blocks, strict=True)]
        *tensors, label, weight = carve([*layout, *[((pairs,), torch.float32)] * 2])
        for name, where, tensor in zip(names, places, tensors, strict=True):
            store.read(name, where, tensor)
        if not self.with_text:
            return tensors[0], None, None, label, weight
        latents, embeds, pooled = tensors
        return (
            latents,
            Conditioning(embeds[:pairs], pooled[:pairs]),
            Conditioning(embeds[pairs:], pooled[pairs:]),
            label,
            weight,
        )


def carve(layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Uninitialised tensors of these shapes and dtypes, side by side in one buffer."""
    sizes = [dtype.itemsize * torch.Size(shape).numel() for shape, dtype in layout]
    starts = np.cumsum([0, *map(aligned, sizes)]).tolist()
    buffer = batch_buffer(starts[-1])
    return [
        buffer[start : start + size].view(dtype).view(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, layout, strict=False)
    ]


def as_is(batch: PreferenceBatch) -> PreferenceBatch:
    """``collate_fn`` for whole batches."""
    return batch
