"""Verification of a cache: hashes and row counts of every file."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentreward.cache import layout
from latentreward.cache.layout import CachePlan, ShardManifest, manifest_name, read_manifest, read_plan
from latentreward.cache.shard_reader import TensorBlock, read_header, read_lengths
from latentreward.errors import InputError
from latentreward.storage.digests import file_hash

THREADS = 4
"""Number of threads that hash shards; hashing waits for the disk and releases the interpreter lock."""


@dataclass(frozen=True)
class Shard:
    """Description of a shard: one row of the table ``shards.parquet``."""

    number: int  # index of the row
    name: str  # path of the shard below the cache's folder
    kind: str  # ``latents`` or ``text``
    height: int | None  # height of the shard's images in pixels; None for text
    width: int | None  # width of the shard's images in pixels; None for text
    count: int  # number of rows (images or prompts) in the shard


@dataclass(frozen=True)
class ShardState:
    """Result of the verification of one shard."""

    shard: Shard  # the shard
    manifest: ShardManifest | None  # manifest of the shard; None if it is missing, damaged, or belongs to another plan
    problem: str | None  # why the shard has to be written (again); None if the shard is complete


def read_shards(folder: Path) -> list[Shard]:
    """Read the table ``shards.parquet`` of the cache in ``folder``, in its order."""
    rows = pq.read_table(folder / layout.SHARDS).to_pylist()
    return [Shard(number, **row) for number, row in enumerate(rows)]


def table_problems(folder: Path, plan: CachePlan) -> list[str]:
    """List one line for each table of the cache that is missing or whose hash differs from the plan's."""
    problems = []
    for name, sha256 in plan.tables.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif file_hash(folder / name) != sha256:
            problems.append(f"{name} is damaged: its hash is not the one in plan.json")
    return problems


def shard_states(folder: Path, plan: CachePlan, shards: list[Shard]) -> Iterator[ShardState]:
    """Verify every shard by reading the whole file, in the order of ``shards``."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda shard: _state(folder, plan, shard), shards)


def check_cache(folder: Path) -> tuple[CachePlan, list[str], Counter[str]]:
    """Verify every hash and count of a cache, and the tables against each other.

    Returns:
        The plan; one line per problem; and the number of images that could not be read when the cache was written,
        by reason.

    Raises:
        InputError: If the plan is missing or cannot be read.
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
        blocks = read_header(folder / shard.name)
    except InputError:
        return f"{shard.name} is not a safetensors file"
    for name, shape in shapes_with_lengths(plan, shard, folder / shard.name, blocks).items():
        if name not in blocks or (blocks[name].rows, *blocks[name].shape) != shape:
            return f"{shard.name} holds no {name} of shape {shape}"
    return None


def shapes_with_lengths(
    plan: CachePlan, shard: Shard, path: Path, blocks: Mapping[str, TensorBlock]
) -> dict[str, tuple[int, ...]]:
    """Return :func:`tensor_shapes` of a written shard, whose file tells the number of tokens where a plan cannot."""
    text = plan.spec.text
    if shard.kind != "text" or text is None or not text.masked:
        return tensor_shapes(plan, shard)
    return tensor_shapes(plan, shard, int(read_lengths(path, blocks, text.num_tokens).sum()))


def tensor_shapes(plan: CachePlan, shard: Shard, tokens: int = 0) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each tensor that a shard must hold; ``tokens`` are those of all prompts in it."""
    if shard.height is not None and shard.width is not None:
        shape = plan.spec.latent_space.shape(shard.height, shard.width, plan.spec.frames)
        return {layout.LATENTS: (shard.count, *shape)}
    text = plan.spec.text
    if text is None:
        raise InputError(f"text shard {shard.number} belongs to a cache without text; write the cache anew")
    pooled = {layout.POOLED_PROMPT_EMBEDS: (shard.count, text.pooled_dim)} if text.pooled_dim else {}
    if text.masked:
        return {layout.PROMPT_LENGTHS: (shard.count,), layout.PROMPT_EMBEDS: (tokens, text.token_dim), **pooled}
    return {layout.PROMPT_EMBEDS: (shard.count, text.num_tokens, text.token_dim), **pooled}


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
