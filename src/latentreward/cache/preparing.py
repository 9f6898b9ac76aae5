"""Preparation of a cache's folder for encoding: a new plan, or a check of the plan there, and the unfinished shards."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from latentreward.cache.check import Shard, read_shards, shard_states, table_problems
from latentreward.cache.layout import PLAN, SCHEMAS, CachePlan, CacheSpec, manifest_name, read_plan
from latentreward.cache.plan import check_same, write_plan
from latentreward.cache.shard_writer import KEPT
from latentreward.cache.sizing import ImageSettings
from latentreward.cache.space import check_space, need_of
from latentreward.data.readers import PairReader
from latentreward.errors import InputError
from latentreward.storage.durable import contents, remove_temporary, write_errors_named

if TYPE_CHECKING:
    from latentreward.encoders.prompts import PromptEncoder

logger = logging.getLogger(__name__)


def prepare_cache(
    folder: Path,
    reader: PairReader,
    images: ImageSettings,
    spec: CacheSpec,
    num_workers: int,
    text: PromptEncoder | None = None,
) -> list[Shard]:
    """Write a plan, or check the plan of an earlier run; return the shards that are missing or damaged.

    Args:
        folder: Folder of the cache, locked by the caller.
        reader: Reader of the pairs to cache.
        images: Settings for the sizes of images.
        spec: Settings of the cache, made from ``images`` and the encoders.
        num_workers: Number of processes that read images.
        text: Text encoder, whose tokenizer tells the lengths of prompts; None if prompts are not cached.

    Raises:
        InputError: If the folder cannot be written to, holds other files, was begun with other settings or data, or
            lies on a disk with too little space.
    """
    with write_errors_named(folder, KEPT):
        begun = (folder / PLAN).exists()
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
                if write_plan(folder, spec, images, reader, num_workers).hash != plan.hash:
                    raise InputError(
                        f"{folder}: {problems[0]}, and the reader's rows are not those of the plan any more; choose "
                        "another output"
                    )
        else:
            plan = write_plan(folder, spec, images, reader, num_workers)
        todo = _unfinished(folder, plan)
        need = need_of(folder, plan, todo, text)
        try:
            check_space(folder, need)
        except InputError:
            if not begun:  # other settings may fit, and the folder is free for them
                for name in (PLAN, *SCHEMAS):
                    (folder / name).unlink()
            raise
        if todo:
            print(f"cache: to write: {need}", file=sys.stderr)
    return todo


def _unfinished(folder: Path, plan: CachePlan) -> list[Shard]:
    """List the shards that are missing or damaged, and remove their manifests."""
    states = list(shard_states(folder, plan, read_shards(folder)))
    todo = [state.shard for state in states if state.problem is not None]
    if damaged := [str(state.problem) for state in states if state.problem and "damaged" in state.problem]:
        logger.warning("%s: %s (%d such); encoding again", folder, damaged[0], len(damaged))
    for shard in todo:  # removed, so that a manifest always means a finished shard
        (folder / manifest_name(shard.name)).unlink(missing_ok=True)
    if len(todo) < len(states):
        print(f"cache: {len(states) - len(todo)} of {len(states)} shards are there already", file=sys.stderr)
    return todo
