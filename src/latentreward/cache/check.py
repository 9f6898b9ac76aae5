"""Whether a cache is whole: hashes and counts of every file."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentreward.cache import layout
from latentreward.cache.layout import CachePlan, ShardManifest, manifest_name, read_manifest, read_plan
from latentreward.cache.shard_writer import file_hash
from latentreward.errors import InputError
from latentreward.storage.safetensors_header import read_header

THREADS = 4
"""Hashing waits for the disk and lets other threads run."""


@dataclass(frozen=True)
class Shard:
    """One row of the shards' table.

    Attributes:
        number: Its row.
        name: Path below the cache's folder.
        kind: ``latents`` or ``text``.
        height: Pixels of the images; None for text.
        width: Likewise.
        count: Rows.
    """

    number: int
    name: str
    kind: str
    height: int | None
    width: int | None
    count: int


@dataclass(frozen=True)
class ShardState:
    """What was found of a shard.

    Attributes:
        shard: Which.
        manifest: None if it is not there or does not belong to this plan.
        problem: Why the shard has to be written (again); None if it need not.
    """

    shard: Shard
    manifest: ShardManifest | None
    problem: str | None


def read_shards(folder: Path) -> list[Shard]:
    """The table of shards."""
    rows = pq.read_table(folder / layout.SHARDS).to_pylist()
    return [Shard(number, **row) for number, row in enumerate(rows)]


def table_problems(folder: Path, plan: CachePlan) -> list[str]:
    """One line for each table that is missing or not as it was written."""
    problems = []
    for name, sha256 in plan.tables.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif file_hash(folder / name) != sha256:
            problems.append(f"{name} is damaged: its hash is not the one in plan.json")
    return problems


def shard_states(folder: Path, plan: CachePlan, shards: list[Shard]) -> Iterator[ShardState]:
    """Look at every shard, reading all of it."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda shard: _state(folder, plan, shard), shards)


def check_cache(folder: Path) -> tuple[CachePlan, list[str], Counter[str]]:
    """Verify every hash and count of a cache, and the tables against each other.

    Args:
        folder: The cache.

    Returns:
        Its plan; one line per problem; and images that could not be read when it was written, by reason.

    Raises:
        InputError: If there is no plan that can be read: then there is nothing to check against.
    """
    plan = read_plan(folder)
    problems = table_problems(folder, plan)
    if not problems:
        problems += list(_disagreements(folder, plan))
    unreadable: Counter[str] = Counter()
    if (folder / layout.SHARDS).is_file() and not any(problem.startswith(layout.SHARDS) for problem in problems):
        for state in shard_states(folder, plan, read_shards(folder)):
            problems += [] if state.problem is None else [state.problem]
            unreadable.update([] if state.manifest is None else state.manifest.unreadable.values())
    return plan, problems, unreadable


def _state(folder: Path, plan: CachePlan, shard: Shard) -> ShardState:
    path = folder / manifest_name(shard.name)
    there, described = (folder / shard.name).is_file(), path.is_file()
    if not there or not described:
        missing = "has no manifest: it was not finished" if there else "is missing"
        return ShardState(shard, None, f"{shard.name} {missing}")
    try:
        manifest = read_manifest(path)
    except InputError:
        return ShardState(shard, None, f"{manifest_name(shard.name)} is damaged")
    if (manifest.plan_hash, manifest.spec_hash, manifest.count) != (plan.hash, plan.spec.hash, shard.count):
        return ShardState(shard, None, f"{shard.name} belongs to another plan")
    if file_hash(folder / shard.name) != manifest.sha256:
        return ShardState(shard, manifest, f"{shard.name} is damaged: its hash is not the one in its manifest")
    return ShardState(shard, manifest, _shape_problem(folder, plan, shard))


def _shape_problem(folder: Path, plan: CachePlan, shard: Shard) -> str | None:
    try:
        header, _, _ = read_header(folder / shard.name)
    except ValueError:
        return f"{shard.name} is no safetensors file"
    for name, shape in tensor_shapes(plan, shard).items():
        if tuple(header.get(name, {}).get("shape", ())) != shape:
            return f"{shard.name} holds no {name} of shape {shape}"
    return None


def tensor_shapes(plan: CachePlan, shard: Shard) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a shard."""
    if shard.height is not None and shard.width is not None:
        space = plan.spec.latent_space
        size = (shard.height // space.downscale, shard.width // space.downscale)
        return {layout.LATENTS: (shard.count, space.channels, *size)}
    text = plan.spec.text
    if text is None:
        raise InputError(f"text shard {shard.number} belongs to a cache without text; write the cache anew")
    return {
        layout.PROMPT_EMBEDS: (shard.count, text.num_tokens, text.token_dim),
        layout.POOLED_PROMPT_EMBEDS: (shard.count, text.pooled_dim),
    }


def _disagreements(folder: Path, plan: CachePlan) -> Iterator[str]:
    wanted = {shard.number: shard.count for shard in read_shards(folder)}
    placed: Counter[int] = Counter()
    for name in (layout.IMAGES, layout.PROMPTS):
        for entry in pc.value_counts(pq.read_table(folder / name, columns=["shard"])["shard"]).to_pylist():
            if entry["values"] is not None:
                placed[entry["values"]] += entry["counts"]
    if wanted != dict(placed):
        yield f"{layout.SHARDS} does not hold as many rows as {layout.IMAGES} and {layout.PROMPTS} place in it"
    planned = {layout.PAIRS: plan.pairs, layout.IMAGES: plan.images}
    planned |= {layout.PROMPTS: plan.prompts, layout.SOURCES: plan.images}
    rows = {name: pq.ParquetFile(folder / name).metadata.num_rows for name in planned}
    if rows != planned:
        yield f"the tables do not hold as many rows as plan.json says: {rows}"
