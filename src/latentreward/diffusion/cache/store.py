"""Files of a cache: latents of images and embeddings of prompts, each encoded once.

::

    CACHE/spec.json                   settings and data that determine the contents, and the tables' digests
    CACHE/pairs.parquet               one row per pair, with row numbers of its prompt and images in the other tables
    CACHE/images.parquet              one row per image: its size, its file, and where the reader has it
    CACHE/prompts.parquet             one row per distinct prompt, the empty one first
    CACHE/latents-NNNNN.safetensors   "latents" (n, C, ...) of images of one size
    CACHE/text-NNNNN.safetensors      "prompt_embeds" (n, L, D) and "pooled_prompt_embeds" (n, P)

The rows of a file are those of its images or prompts, in the order of the table. Of a text encoder with a mask only the
tokens of the prompts are stored, one prompt after the other: "prompt_embeds" is (tokens, D), and "prompt_lengths" (n,)
int32. A file gets its name when it is complete. Its metadata tell the plan that it belongs to, a digest of its
contents, and the rows that hold zeros, since their images could not be read. Files depend on the data and the settings
alone.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.digests import digest, file_hash
from latentreward.core.storage.json_files import checked, read_config
from latentreward.data.images import ExifOrientation
from latentreward.diffusion.cache.sources import CacheDtype, ImageSettings, TextSpec

SPEC = "spec.json"
PAIRS, IMAGES, PROMPTS = TABLES = "pairs.parquet", "images.parquet", "prompts.parquet"
LATENTS, EMBEDS, POOLED, LENGTHS = "latents", "prompt_embeds", "pooled_prompt_embeds", "prompt_lengths"
AGAIN = "encode again with `latentreward cache`"
MISSING = "missing"
FIELDS = {
    **dict.fromkeys(("pair_id", "group_id", "model_a", "model_b", "source", "split"), pa.string()),
    **dict.fromkeys(("label_a", "weight", "confidence"), pa.float64()),
    "votes": pa.list_(pa.int64()),
}
"""Fields of a pair that are stored as they are."""
PLACE = {"file": pa.int32(), "reader_row": pa.int64()}
ROWS = dict.fromkeys(("prompt", "image_a", "image_b"), pa.int64()) | {"source_images": pa.list_(pa.int64())}
IMAGE = {"image_key": pa.string(), "height": pa.int32(), "width": pa.int32(), "noise": pa.string(), "side": pa.string()}
SCHEMAS = {PAIRS: FIELDS | ROWS, IMAGES: IMAGE | PLACE, PROMPTS: {"prompt": pa.large_string()} | PLACE}
"""Columns of the tables. ``side`` is a or b, or the place, from 0, of a picture that the images are edits of; the
``reader_row`` of a prompt is null unless its text encoder sees these pictures too."""


@dataclass(frozen=True)
class CacheSpec:
    """Settings that, together with the data, determine the bytes of a cache."""

    latent_space: LatentSpace  # space of the latents
    vae: str | None  # fingerprint of the VAE; None for latents that were copied
    text: TextSpec | None  # settings of the text embeddings; None if prompts are not cached
    origin: str  # ``vae`` for images encoded by this program; else the published cache that was copied
    vae_dtype: str | None  # dtype that the VAE ran in; None for copied latents
    posterior: str | None  # whether latents are a sample or the mode of the VAE's posterior; None for copied latents
    batch_size: int  # number of images encoded together
    images: ImageSettings  # sizes of the images
    dtype: CacheDtype  # dtype in which latents and embeddings are stored
    seed: int = 0  # seed of the posterior samples
    images_per_shard: int = 1024  # largest number of images in a file
    exif: ExifOrientation = "ignore"  # whether images were turned upright; ``ignore`` for copied latents


@dataclass(frozen=True)
class CachePlan:
    """Content of ``spec.json``."""

    spec: CacheSpec  # settings of the cache
    data: dict[str, Any]  # description of the reader, see :func:`latentreward.diffusion.cache.writing.describe_data`
    tables: dict[str, str]  # SHA-256 of each table's file
    pairs: int  # number of pairs kept
    images: int  # number of images to cache; an image cached in two buckets counts twice
    prompts: int  # number of distinct prompts, with the empty one
    dropped: dict[str, int] = field(default_factory=dict)  # number of pairs left out in planning, by reason
    version: Literal[2] = 2  # version of the format

    @property
    def name(self) -> str:
        """Digest of all but ``dropped``, which each file of the cache names."""
        return digest([replace(self, dropped={}).to_json()])

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, ensure_ascii=False) + "\n"


class CacheFile(NamedTuple):
    """A safetensors file of a cache."""

    name: str
    rows: np.ndarray  # ``(n,)`` rows in the table of images or prompts that it holds
    size: tuple[int, int] | None  # height and width in pixels of its images; None for prompts


def read_plan(folder: Path) -> CachePlan:
    """Read ``spec.json`` of a cache; raises InputError if it is missing, damaged or of an earlier version."""
    path = folder / SPEC
    if not path.is_file():
        raise InputError(f"{folder} is not a cache: it has no {SPEC}; run `latentreward cache` or check the path")
    plan: CachePlan = checked(CachePlan, read_config(path, remedy=AGAIN), f"{path}: ", f"; {AGAIN}")
    return plan


def read_table(folder: Path, name: str) -> pa.Table:
    """Read a table of a cache, with the checksums of its pages; raises InputError if it is missing or damaged."""
    path = (folder / name).absolute()
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return table.select([*SCHEMAS[name]]).cast(pa.schema(SCHEMAS[name]))
    except (pa.ArrowException, LookupError, OSError) as error:
        problem = MISSING if isinstance(error, FileNotFoundError) else f"damaged ({first_line(error)})"
        raise InputError(f"{path} is {problem}; run the same `latentreward cache` again") from error


def files_of(folder: Path) -> list[CacheFile]:
    """List the files that the tables of a cache name, latents first."""
    images, found = read_table(folder, IMAGES), list[CacheFile]()
    sizes = [images[side].to_numpy() for side in ("height", "width")]
    for kind, table in (("latents", images), ("text", read_table(folder, PROMPTS))):
        numbers = table["file"].fill_null(-1).to_numpy()  # a prompt that is not encoded has no file
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for rows in np.split(order, starts)[1:]:
            size = None if kind == "text" else (int(sizes[0][rows[0]]), int(sizes[1][rows[0]]))
            found.append(CacheFile(f"{kind}-{numbers[rows[0]]:05d}.safetensors", rows, size))
    return found


@contextmanager
def opened(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the tensors of a safetensors file, mapped and not read, and its metadata as the entry "cache"."""
    try:
        with safe_open(folder / name, "pt") as file:
            record = json.loads((file.metadata() or {}).get("cache", "{}"))
            yield {**{one: file.get_tensor(one) for one in file.keys()}, "cache": record}  # noqa: SIM118
    except InputError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({first_line(error)})"
        raise InputError(f"{name} is {problem}") from error


def check_file(folder: Path, plan: CachePlan, file: CacheFile, contents: bool = True) -> dict[int, str]:
    """Check a file and, if ``contents``, its digest; return why rows of the table have no latents."""
    with opened(folder, file.name) as tensors:
        record = tensors.pop("cache")
        if record.get("plan") != plan.name:
            raise InputError(f"{file.name} belongs to another cache")
        found, dtype = tensors.get(LATENTS if file.size is not None else EMBEDS), f"torch.{plan.spec.dtype}"
        if found is None or str(found.dtype) != dtype or found.shape != _shape(plan.spec, file, tensors):
            raise InputError(f"{file.name} is damaged: its tensors are not those of the plan")
        if contents and digest_of(tensors, record["unread"]) != record["sha256"]:
            raise InputError(f"{file.name} is damaged: its contents are not those of its digest")
        return {int(file.rows[int(row)]): str(reason) for row, reason in record["unread"].items()}


def _shape(spec: CacheSpec, file: CacheFile, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the latents or embeddings of a file; of prompts with a mask the tokens follow each other."""
    if file.size is not None or spec.text is None:
        return len(file.rows), *spec.latent_space.shape(*(file.size or (0, 0)), spec.images.frames)
    tokens = (int(tensors[LENGTHS].sum()),) if spec.text.masked else (len(file.rows), spec.text.num_tokens)
    return *tokens, spec.text.token_dim


def check_files(folder: Path, plan: CachePlan) -> list[tuple[str, dict[int, str]]]:
    """Check all files; return the problem of each, empty without one, and why rows of the table have no latents."""

    def state(file: CacheFile) -> tuple[str, dict[int, str]]:
        try:
            return "", check_file(folder, plan, file)
        except InputError as error:
            return str(error), {}

    with ThreadPoolExecutor(4) as pool:  # hashing waits for the disk, and releases the interpreter's lock
        return list(pool.map(state, files_of(folder)))


def damaged_tables(folder: Path, plan: CachePlan) -> list[str]:
    """List a problem for each table that is missing or is not that of the plan."""
    there = {name: (folder / name).is_file() for name in TABLES}
    whole = {name for name in TABLES if there[name] and file_hash(folder / name) == plan.tables.get(name)}
    return [f"{name} is {'damaged' if there[name] else 'missing'}" for name in TABLES if name not in whole]


def digest_of(tensors: Mapping[str, Tensor], unread: Mapping[str, str]) -> str:
    """Compute the SHA-256 of a file's contents."""
    state = sha256(json.dumps(unread, sort_keys=True).encode())
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
