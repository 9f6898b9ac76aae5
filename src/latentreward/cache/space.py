"""Bytes that a cache still takes on the disk, known before anything is encoded."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentreward.cache.check import Shard, tensor_shapes
from latentreward.cache.encoding import PlannedRows
from latentreward.cache.layout import CachePlan
from latentreward.cache.shard_writer import stored_dtype
from latentreward.errors import InputError
from latentreward.storage.progress import Progress

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder

PROMPTS_AT_ONCE = 256
"""Number of prompts that are tokenised together."""
ITEMS = {"latents": "image", "text": "prompt"}
"""Kind of a shard → what one of its rows belongs to."""


@dataclass(frozen=True)
class Need:
    """Bytes of the shards that are not written yet."""

    counts: Mapping[str, int]  # number of images, under ``latents``, and of prompts, under ``text``
    sizes: Mapping[str, int]  # bytes of their latents and embeddings

    @property
    def total(self) -> int:
        """Bytes of latents and embeddings."""
        return sum(self.sizes.values())

    def __str__(self) -> str:
        """Describe the bytes of an image and of a prompt, on average, and of all."""
        return "; ".join(
            f"{kind} {size_text(self.sizes[kind] / count)} per {ITEMS[kind]}, {size_text(self.sizes[kind])} for {count}"
            for kind, count in sorted(self.counts.items())
        )


def need_of(folder: Path, plan: CachePlan, todo: Sequence[Shard], encoder: PromptEncoder | None) -> Need:
    """Compute the bytes of the tensors in the shards ``todo``.

    Args:
        folder: Folder of the cache, with its tables.
        plan: Plan of the cache.
        todo: Shards to write.
        encoder: Text encoder, whose tokenizer tells the lengths of prompts; None if no embeddings are cached.
    """
    counts, sizes, dtype = Counter[str](), Counter[str](), getattr(torch, plan.spec.dtype)
    ragged = [shard for shard in todo if shard.kind == "text"] if encoder is not None and encoder.masked else []
    planned = PlannedRows(folder) if ragged else None
    with Progress("cache: count tokens", sum(shard.count for shard in ragged), "prompts") as progress:
        for shard in todo:
            tokens = 0
            if encoder is not None and planned is not None and shard.kind == "text":
                prompts = planned.prompts.take(planned.rows(shard)).to_pylist()
                for first in range(0, len(prompts), PROMPTS_AT_ONCE):
                    tokens += sum(encoder.count_tokens(prompts[first : first + PROMPTS_AT_ONCE]))
                progress.add(shard.count)
            shapes = tensor_shapes(plan, shard, tokens)
            sizes[shard.kind] += sum(prod(shape) * stored_dtype(name, dtype).itemsize for name, shape in shapes.items())
            counts[shard.kind] += shard.count
    return Need(counts, sizes)


def check_space(folder: Path, need: Need) -> None:
    """Check that the disk of ``folder`` can hold ``need``.

    Raises:
        InputError: If it cannot.
    """
    free = shutil.disk_usage(folder).free
    if need.total > free:
        raise InputError(
            f"output={str(folder)!r}: {size_text(need.total)} are to be written ({need}), but only {size_text(free)} "
            "are free there; free some space, choose another output, or cache less, e.g. encoder.text: none"
        )


def size_text(size: float) -> str:
    """Return a number of bytes for people, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.{0 if unit == 'B' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
