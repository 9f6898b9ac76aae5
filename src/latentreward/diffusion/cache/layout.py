"""Format of a cache folder, version 1: file names, columns of the tables, plan and manifests.

::

    CACHE/plan.json                            the plan: settings, data, hashes of the tables
    CACHE/pairs.parquet                        one row per pair
    CACHE/images.parquet                       one row per cached image: shard and row of its latents
    CACHE/prompts.parquet                      one row per distinct prompt: shard and row of its embeddings; a prompt
                                               is a text, or text and pictures if the text encoder sees these too
    CACHE/shards.parquet                       one row per shard; the row's index is the shard's number
    CACHE/sources.parquet                      one row per cached image: its row and side in the reader, for writing
    CACHE/latents/HHHHxWWWW-NNNNN.safetensors  one tensor "latents" (N, C, h, w) of images of H × W pixels, or
                                               (N, C, T, h, w) in a latent space with a time axis
    CACHE/source_latents/HHHHxWWWW-NNNNN.safetensors   the same of pictures that are edited: the mode of the VAE's
                                                       posterior, where the latents of images are samples of it
    CACHE/text/NNNNN.safetensors               "prompt_embeds" (N, L, D) and "pooled_prompt_embeds" (N, P)

A text encoder without a pooled vector leaves "pooled_prompt_embeds" out. Of a text encoder with a mask only the tokens
of the prompts are stored, one prompt after the other: "prompt_embeds" is (tokens, D), and "prompt_lengths" (N,) int32
holds the number of tokens of each prompt.

Each shard has a manifest, named as the shard with ``.json`` appended, which is written last: a shard without a manifest
is not finished. Files hold no time stamps, so that their bytes depend on the data and the settings alone.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa

from latentreward.core.contracts import ImageRef, LatentSpace, PreferencePair, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage import digests
from latentreward.core.storage.json_files import read_config
from latentreward.data.clips import FPS
from latentreward.data.images import ExifOrientation

VERSION = 1

PLAN = "plan.json"
PAIRS, IMAGES, PROMPTS = "pairs.parquet", "images.parquet", "prompts.parquet"
SHARDS, SOURCES = "shards.parquet", "sources.parquet"
LATENTS_FOLDER, SOURCE_LATENTS_FOLDER, TEXT_FOLDER = "latents", "source_latents", "text"
"""Folders of the shards, whose names are the kinds of shards."""
KINDS = (LATENTS_FOLDER, SOURCE_LATENTS_FOLDER, TEXT_FOLDER)
SHARD_NAME = re.compile(rf"({'|'.join(KINDS)})/[0-9x-]+\.safetensors")
LATENTS, PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS = "latents", "prompt_embeds", "pooled_prompt_embeds"
PROMPT_LENGTHS = "prompt_lengths"
"""Names of the tensors in a shard."""

CacheDtype = Literal["float16", "bfloat16", "float32"]

SCHEMAS = {
    PAIRS: pa.schema(
        {
            "pair_id": pa.string(),
            "prompt": pa.int32(),
            "image_a": pa.int64(),
            "image_b": pa.int64(),
            "label_a": pa.float64(),
            "weight": pa.float64(),
            "group_id": pa.string(),
            "votes_a": pa.int64(),
            "votes_b": pa.int64(),
            "confidence": pa.float64(),
            "model_a": pa.string(),
            "model_b": pa.string(),
            "source": pa.string(),
            "split": pa.string(),
        }
    ),
    IMAGES: pa.schema(
        {
            "image_key": pa.string(),
            "height": pa.int32(),
            "width": pa.int32(),
            "shard": pa.int32(),
            "row": pa.int32(),
            "batch": pa.int32(),
        }
    ),
    PROMPTS: pa.schema({"prompt": pa.large_string(), "shard": pa.int32(), "row": pa.int32()}),
    SHARDS: pa.schema(
        {"name": pa.string(), "kind": pa.string(), "height": pa.int32(), "width": pa.int32(), "count": pa.int32()}
    ),
    SOURCES: pa.schema({"reader_row": pa.int64(), "side": pa.string()}),
}
"""Columns of each table.

``prompt`` of a pair is a row index of the prompts' table, ``image_a`` and ``image_b`` are row indices of the images'
table. So are the values of :data:`SOURCE_IMAGES`. ``shard`` is a row index of the shards' table, and ``row`` is a row
index in that shard. ``height`` and ``width`` are pixels as encoded, null for text. ``batch`` is the index, in its
shard, of the batch that an image is encoded in. ``label_a`` is null for unlabelled pairs. ``shard`` and ``row`` of a
prompt are null if prompts are not cached. ``name`` is the path below the cache's folder. ``side`` is ``a`` or ``b``:
the image of the pair in row ``reader_row`` of the reader; or the place, from 0, of a picture that it is an edit of.
"""
SOURCE_IMAGES = pa.field("source_images", pa.list_(pa.int64()))
"""Last column of the pairs' table if the images are edits: the pictures that were edited, in their order."""


NOISE = pa.field("noise", pa.string())
"""Last column of the images' table if some were generated from a noise that is known: its name."""
READER_ROW = pa.field("reader_row", pa.int64())
"""Last column of the prompts' table if the text encoder sees the pictures too: a row of the reader with the prompt, for
writing; null for the empty prompt, which has no pictures.
"""


def schema_of(table: str, edits: bool, seen: bool = False, noises: bool = False) -> pa.Schema:
    """Return the columns of a table of a cache.

    Args:
        table: File name of the table.
        edits: Whether the images are edits.
        seen: Whether the text encoder sees the pictures that are edited.
        noises: Whether it is known of some images which noise they were generated from.
    """
    more = {PAIRS: edits and SOURCE_IMAGES, PROMPTS: seen and READER_ROW, IMAGES: noises and NOISE}
    return pa.schema([*SCHEMAS[table], *filter(None, [more.get(table)])])


def images_of(pair: PreferencePair) -> dict[str, ImageRef]:
    """Return the images of a pair by their ``side``: a, b, and the pictures that these are edits of."""
    sources = {str(place): source for place, source in enumerate(sources_of(pair.prompt))}
    return {"a": pair.image_a, "b": pair.image_b, **sources}


def latents_name(height: int, width: int, number: int, folder: str = LATENTS_FOLDER) -> str:
    """Return the path, below the cache's folder, of shard ``number`` of images of ``height`` × ``width`` pixels."""
    return f"{folder}/{height:04d}x{width:04d}-{number:05d}.safetensors"


def text_name(number: int) -> str:
    """Return the path, below the cache's folder, of shard ``number`` of text embeddings."""
    return f"{TEXT_FOLDER}/{number:05d}.safetensors"


def manifest_name(shard_name: str) -> str:
    """Return the path of the manifest of a shard."""
    return f"{shard_name}.json"


def canonical_json(value: Any) -> str:
    """Convert a value to JSON with sorted keys, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def digest(value: Any) -> str:
    """Compute the hash (32 hexadecimal digits) of a JSON-compatible value."""
    return digests.digest([canonical_json(value)])


@dataclass(frozen=True)
class TextSpec:
    """Settings of the text embeddings in a cache."""

    fingerprint: str  # see :func:`latentreward.diffusion.encoders.fingerprint.text_fingerprint`
    num_tokens: int  # number of tokens of each prompt; with a mask, the greatest number
    token_dim: int  # D of ``prompt_embeds``
    pooled_dim: int  # P of ``pooled_prompt_embeds`` (N, P); 0 if there is none
    dtype: CacheDtype  # dtype that the text encoders ran in
    batch_size: int  # number of prompts encoded together
    prompts_per_shard: int  # largest number of prompts in a shard
    masked: bool = False  # whether prompts have unequal numbers of tokens, see :attr:`PromptEncoder.masked`


@dataclass(frozen=True)
class CacheSpec:
    """Settings that, together with the data, determine the bytes of a cache."""

    origin: str  # ``vae`` for images encoded by this program; else the published cache that was copied
    vae: str | None  # see :func:`latentreward.diffusion.encoders.fingerprint.vae_fingerprint`; None for copied latents
    vae_dtype: str | None  # dtype that the VAE ran in; None for copied latents
    latent_space: LatentSpace  # space of the latents
    posterior: str | None  # whether latents are a sample or the mode of the VAE's posterior; None for copied latents
    seed: int  # seed of the posterior samples
    dtype: CacheDtype  # dtype in which latents and embeddings are stored
    size: tuple[int, int] | None  # (height, width) in pixels that all images are resized to; None with buckets
    buckets: tuple[tuple[int, int], ...] | None  # (height, width) in pixels of each bucket; None with one size
    resize: str | None  # resize method, see ``latentreward.data.PixelLoader``; None for copied latents
    cross_bucket: (
        str  # treatment of a pair of two buckets, see :class:`~latentreward.diffusion.cache.sizing.ImageSettings`
    )
    min_pixels: int  # smallest number of pixels of an image; pairs with a smaller image are left out
    batch_size: int  # number of images encoded together
    images_per_shard: int  # largest number of images in a shard
    text: TextSpec | None = None  # settings of the text embeddings; None if prompts are not cached
    exif: ExifOrientation = "ignore"  # whether images were turned upright; ``ignore`` for copied latents
    frames: int = 1  # number of frames of clips; 1 for images
    fps: float = FPS  # frames per second of clips

    @property
    def hash(self) -> str:
        """Hash of all fields."""
        return digest(self.record())

    def record(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "latent_space": self.latent_space.record()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Create the spec from ``values``, the JSON form of :meth:`record`."""
        values = dict(values)
        values["latent_space"] = LatentSpace.from_record(values["latent_space"])
        values["text"] = None if values["text"] is None else TextSpec(**values["text"])
        values["size"] = None if values["size"] is None else tuple(values["size"])
        values["buckets"] = None if values["buckets"] is None else tuple(map(tuple, values["buckets"]))
        return cls(**values)


@dataclass(frozen=True)
class CachePlan:
    """Content of ``plan.json``."""

    spec: CacheSpec  # settings of the cache
    data: dict[str, Any]  # description of the reader, see :func:`latentreward.diffusion.cache.plan.describe_data`
    tables: dict[str, str]  # SHA-256 of each table's file
    pairs: int  # number of pairs kept
    images: int  # number of images to cache; an image cached in two buckets counts twice
    prompts: int  # number of distinct prompts, including the empty prompt if embeddings are cached
    dropped: dict[str, int] = field(default_factory=dict)  # number of pairs left out in planning, by reason
    version: int = VERSION  # version of the cache format

    @property
    def hash(self) -> str:
        """Hash of the settings, the data and the tables; each shard's manifest names it."""
        return digest({name: value for name, value in self._record().items() if name != "dropped"})

    @property
    def empty_prompt(self) -> int | None:
        """Row index of the empty prompt in the prompts' table; None if embeddings are not cached."""
        return None if self.spec.text is None else 0

    def to_json(self) -> str:
        """Return the text of ``plan.json``."""
        return canonical_json({**self._record(), "spec_hash": self.spec.hash, "plan_hash": self.hash})

    def _record(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.record()}


@dataclass(frozen=True)
class ShardManifest:
    """Content of the JSON file beside a shard."""

    count: int  # number of rows in the shard
    sha256: str  # SHA-256 of the shard's file
    spec_hash: str  # hash of the settings
    plan_hash: str  # hash of the plan
    unreadable: dict[int, str] = field(default_factory=dict)  # row, which holds zeros → why not read

    def to_json(self) -> str:
        """Return the text of the manifest's file."""
        return canonical_json(asdict(self))


def read_plan(folder: Path) -> CachePlan:
    """Read ``plan.json`` of a cache.

    Raises:
        InputError: If the file is missing, is damaged, or has another version of the format.
    """
    path = folder / PLAN
    if not path.is_file():
        raise InputError(f"{folder} is not a cache: it has no {PLAN}; run `latentreward cache` or check the path")
    values = read_config(path, remedy="write the cache again")
    if values.get("version") != VERSION:
        raise InputError(
            f"{path} has version {values.get('version')!r}, but this program reads version {VERSION}; write the cache "
            "again"
        )
    try:
        known = {name.name for name in fields(CachePlan)} - {"spec"}
        plan = CachePlan(spec=CacheSpec.from_json(values["spec"]), **{name: values[name] for name in known})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); write the cache again") from error
    if plan.spec.hash != values.get("spec_hash") or plan.hash != values.get("plan_hash"):
        raise InputError(f"{path} was changed: its hashes do not fit; write the cache again")
    return plan


def read_manifest(path: Path) -> ShardManifest:
    """Read the manifest at ``path``.

    Raises:
        InputError: If the file is missing or damaged.
    """
    remedy = "run `latentreward cache` again with the same settings"
    if not path.is_file():
        raise InputError(f"{path} is missing; {remedy}")
    try:
        values = read_config(path, remedy=remedy)
        values["unreadable"] = {int(row): str(reason) for row, reason in values["unreadable"].items()}
        return ShardManifest(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged; {remedy}") from error
