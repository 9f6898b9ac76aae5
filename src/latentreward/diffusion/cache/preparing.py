"""Preparation of a cache's folder for encoding: its plan, the unfinished shards, and the bytes that they take."""

from __future__ import annotations

import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentreward.core.errors import InputError
from latentreward.core.storage.durable import contents, refuse_link, remove_temporary, write_errors_named, write_file
from latentreward.core.storage.progress import Progress
from latentreward.data import PairReader
from latentreward.data.dataset import any_prompt
from latentreward.data.images import read_header
from latentreward.diffusion.cache.check import Shard, read_shards, shard_states, table_problems, tensor_shapes
from latentreward.diffusion.cache.encoding import EncodeBatches
from latentreward.diffusion.cache.layout import KINDS, PLAN, SCHEMAS, CachePlan, CacheSpec, manifest_name, read_plan
from latentreward.diffusion.cache.plan import check_same, write_plan
from latentreward.diffusion.cache.shards import KEPT, stored_dtype
from latentreward.diffusion.cache.sizing import ImageSettings

if TYPE_CHECKING:
    from latentreward.diffusion.encoders.prompts import PromptEncoder

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 64
"""Number of prompts that are tokenised together, with their pictures in memory where the text encoder sees these."""
ITEMS = {"latents": "image", "source_latents": "source", "text": "prompt"}
"""Kind of a shard → what one of its rows belongs to."""


@dataclass(frozen=True)
class Need:
    """Bytes of the shards that are not written yet."""

    counts: Mapping[str, int]  # number of images, of sources and of prompts, by the kind of their shards
    sizes: Mapping[str, int]  # bytes of their latents and embeddings

    @property
    def total(self) -> int:
        """Bytes of latents and embeddings."""
        return sum(self.sizes.values())

    def __str__(self) -> str:
        return "; ".join(
            f"{kind} {size_text(self.sizes[kind] / count)} per {ITEMS[kind]}, {size_text(self.sizes[kind])} for {count}"
            for kind, count in sorted(self.counts.items())
        )


def need_of(
    plan: CachePlan, todo: Sequence[Shard], encoder: PromptEncoder | None, batches: EncodeBatches | None
) -> Need:
    """Compute the bytes of the tensors in the shards ``todo``.

    Args:
        plan: Plan of the cache.
        todo: Shards to write.
        encoder: Text encoder, whose tokenizer tells the lengths of prompts; None if no embeddings are cached.
        batches: Batches of the cache, if the text encoder has a mask; else None.
    """
    counts, sizes, dtype = Counter[str](), Counter[str](), getattr(torch, plan.spec.dtype)
    ragged = [shard for shard in todo if shard.kind == "text"] if batches is not None else []
    with Progress("cache: count tokens", sum(shard.count for shard in ragged), "prompts") as progress:
        for shard in todo:
            tokens = 0
            if encoder is not None and batches is not None and shard.kind == "text":
                rows = batches.planned.rows[shard.number]
                for first in range(0, len(rows), PROMPTS_AT_ONCE):
                    prompts = batches.prompts(rows[first : first + PROMPTS_AT_ONCE], read_header)
                    tokens += sum(encoder.count_tokens(prompts))
                progress.add(shard.count)
            shapes = tensor_shapes(plan, shard, tokens)
            sizes[shard.kind] += sum(prod(shape) * stored_dtype(name, dtype).itemsize for name, shape in shapes.items())
            counts[shard.kind] += shard.count
    return Need(counts, sizes)


def prepare_cache(
    folder: Path,
    reader: PairReader,
    images: ImageSettings,
    spec: CacheSpec,
    num_workers: int,
    text: PromptEncoder | None = None,
    check_sources: Callable[[int], None] = lambda number: None,
    check_prompt: Callable[[str], None] = any_prompt,
) -> list[Shard]:
    """Write a plan, or check the plan of an earlier run; return the shards that are missing or damaged.

    Args:
        folder: Folder of the cache, locked by the caller.
        reader: Reader of the pairs to cache.
        images: Settings for the sizes of images.
        spec: Settings of the cache, made from ``images`` and the encoders.
        num_workers: Number of processes that read images.
        text: Text encoder, whose tokenizer tells the lengths of prompts; None if prompts are not cached.
        check_sources: Function that raises InputError for a number of pictures that the network does not edit.
        check_prompt: Function that raises InputError for a prompt that the text encoder does not take.

    Raises:
        InputError: If the folder cannot be written to, holds other files, was begun with other settings or data, or
            lies on a disk with too little space.
    """
    for kind in KINDS:
        refuse_link(folder / kind)
    with write_errors_named(folder, KEPT):
        begun, seen = (folder / PLAN).exists(), text is not None and text.sees_sources
        if not begun:
            # Tables that a killed run wrote before its plan are allowed.
            strangers = [name for name in contents(folder) if not name.startswith((PLAN, *SCHEMAS))]
            if strangers:
                raise InputError(
                    f"output={str(folder)!r} has no {PLAN} but holds {strangers[0]} ({len(strangers)} such files); "
                    "choose an empty folder, or restore the plan"
                )
        remove_temporary(folder)
        if begun:
            plan = read_plan(folder)
            check_same(folder, plan, spec, reader)
            if problems := table_problems(folder, plan):
                logger.warning("%s: %s; planning again", folder, "; ".join(problems))
                again = write_plan(folder, spec, images, reader, num_workers, check_sources, seen, check_prompt)
                if again.hash != plan.hash:
                    write_file(folder / PLAN, plan.to_json(), KEPT)  # else the next run would take the other rows
                    raise InputError(
                        f"{folder}: {problems[0]}, and the reader's rows are not those of the plan any more; choose "
                        "another output"
                    )
        else:
            plan = write_plan(folder, spec, images, reader, num_workers, check_sources, seen, check_prompt)
        todo = _unfinished(folder, plan)
        batches = EncodeBatches(folder, reader, images.max_pixels) if text is not None and text.masked else None
        need, free = need_of(plan, todo, text, batches), shutil.disk_usage(folder).free
        if need.total > free:
            if not begun:  # other settings may fit, and the folder is free for them
                for name in (PLAN, *SCHEMAS):
                    (folder / name).unlink()
            raise InputError(
                f"output={str(folder)!r}: {size_text(need.total)} are to be written ({need}), but only "
                f"{size_text(free)} are free there; free some space, choose another output, or cache less, e.g. "
                "encoder.text: none"
            )
        if todo:
            print(f"cache: to write: {need}", file=sys.stderr)
    return todo


def _unfinished(folder: Path, plan: CachePlan) -> list[Shard]:
    """List the shards that are missing or damaged, and remove their manifests."""
    states = shard_states(folder, plan, read_shards(folder))
    todo = [shard for shard, _, problem in states if problem]
    if damaged := [problem for *_, problem in states if "damaged" in problem]:
        logger.warning("%s: %s (%d such); encoding again", folder, damaged[0], len(damaged))
    for shard in todo:  # removed, so that a manifest always means a finished shard
        (folder / manifest_name(shard.name)).unlink(missing_ok=True)
    if len(todo) < len(states):
        print(f"cache: {len(states) - len(todo)} of {len(states)} shards are there already", file=sys.stderr)
    return todo


def size_text(size: float) -> str:
    """Return a number of bytes for people, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.{0 if unit == 'B' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
