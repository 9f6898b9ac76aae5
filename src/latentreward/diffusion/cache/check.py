"""Verification of a cache: hashes and row counts of every file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentreward.core.errors import InputError
from latentreward.core.storage.digests import file_hash
from latentreward.diffusion.cache import layout
from latentreward.diffusion.cache.layout import CachePlan, ShardManifest, manifest_name, read_manifest, read_plan
from latentreward.diffusion.cache.shards import TensorBlock, read_header, read_lengths

THREADS = 4
"""Number of threads that hash shards; hashing waits for the disk and releases the interpreter lock."""


@dataclass(frozen=True)
class Shard:
    """Description of a shard: one row of the table ``shards.parquet``."""

    number: int  # index of the row
    name: str  # path of the shard below the cache's folder
    kind: str  # ``latents``, ``source_latents`` or ``text``
    height: int | None  # height of the shard's images in pixels; None for text
    width: int | None  # width of the shard's images in pixels; None for text
    count: int  # number of rows (images or prompts) in the shard

    def __post_init__(self) -> None:
        if not layout.SHARD_NAME.fullmatch(str(self.name)):
            raise InputError(f"{layout.SHARDS} names {self.name!r:.100}, which is no shard; write the cache anew")


def read_shards(folder: Path) -> list[Shard]:
    """Read the table ``shards.parquet`` of the cache in ``folder``, in its order."""
    rows = pq.read_table((folder / layout.SHARDS).absolute()).to_pylist()
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


def shard_states(
    folder: Path, plan: CachePlan, shards: Sequence[Shard]
) -> list[tuple[Shard, ShardManifest | None, str]]:
    """Check every whole shard; return each with its manifest and with its problem, empty if it is complete."""

    def state(shard: Shard) -> tuple[Shard, ShardManifest | None, str]:
        try:
            return shard, check_shard(folder, plan, shard), ""
        except InputError as error:
            return shard, None, str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, shards))


def check_shard(
    folder: Path, plan: CachePlan, shard: Shard, blocks: Mapping[str, TensorBlock] | None = None
) -> ShardManifest:
    """Check a shard's manifest and tensors against the plan, and return the manifest.

    ``blocks`` is the header of the file; None reads it, and the whole file to compare it with its hash.

    Raises:
        InputError: If the shard is missing, not finished, damaged or of another plan.
    """
    path, manifest_path, text = folder / shard.name, folder / manifest_name(shard.name), plan.spec.text
    if not path.is_file() or not manifest_path.is_file():
        missing = "has no manifest: it was not finished" if path.is_file() else "is missing"
        raise InputError(f"{shard.name} {missing}")
    try:
        manifest = read_manifest(manifest_path)
    except InputError as error:
        raise InputError(f"{manifest_name(shard.name)} is damaged") from error
    if (manifest.plan_hash, manifest.spec_hash, manifest.count) != (plan.hash, plan.spec.hash, shard.count):
        raise InputError(f"{shard.name} belongs to another plan")
    if blocks is None and file_hash(path) != manifest.sha256:
        raise InputError(f"{shard.name} is damaged: its hash is not the one in its manifest")
    try:
        blocks = read_header(path) if blocks is None else blocks
    except InputError as error:
        raise InputError(f"{shard.name} is not a safetensors file") from error
    tokens = 0  # a plan cannot tell those of a text encoder with a mask
    if shard.kind == "text" and text is not None and text.masked:
        tokens = int(read_lengths(path, blocks, text.num_tokens).sum())
    for name, shape in tensor_shapes(plan, shard, tokens).items():
        if name not in blocks or (blocks[name].rows, *blocks[name].shape) != shape:
            raise InputError(f"{shard.name} holds no {name} of shape {shape}")
    return manifest


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


def check_cache(folder: Path) -> tuple[CachePlan, list[str], Counter[str]]:
    """Verify every hash and count of a cache, and the tables against each other.

    Returns:
        The plan; one line per problem; and the number of images that could not be read when the cache was written,
        by reason.

    Raises:
        InputError: If the plan is missing or cannot be read.
    """
    plan = read_plan(folder)
    problems, unreadable = table_problems(folder, plan), Counter[str]()
    if not problems:
        placed: Counter[int] = Counter()
        for name in (layout.IMAGES, layout.PROMPTS):
            shards = pq.read_table((folder / name).absolute(), columns=["shard"])["shard"]
            for entry in pc.value_counts(shards).to_pylist():
                if entry["values"] is not None:
                    placed[entry["values"]] += entry["counts"]
        if {shard.number: shard.count for shard in read_shards(folder)} != dict(placed):
            tables = f"{layout.IMAGES} and {layout.PROMPTS}"
            problems.append(f"{layout.SHARDS} does not hold as many rows as {tables} place in it")
        planned = {layout.PAIRS: plan.pairs, layout.IMAGES: plan.images}
        planned |= {layout.PROMPTS: plan.prompts, layout.SOURCES: plan.images}
        rows = {name: pq.ParquetFile((folder / name).absolute()).metadata.num_rows for name in planned}
        if rows != planned:
            problems.append(f"the tables do not hold as many rows as plan.json says: {rows}")
    if (folder / layout.SHARDS).is_file() and not any(problem.startswith(layout.SHARDS) for problem in problems):
        for shard, manifest, problem in shard_states(folder, plan, read_shards(folder)):
            problems += [problem] if problem else []
            with suppress(InputError, OSError):  # a damaged shard counts too, if its manifest is whole
                unreadable.update((manifest or read_manifest(folder / manifest_name(shard.name))).unreadable.values())
    return plan, problems, unreadable
