"""What lies in a cache folder, version 1: file names, columns, and the two kinds of JSON files.

::

    CACHE/plan.json                            what was planned, from which data, with which settings
    CACHE/pairs.parquet                        one row per pair
    CACHE/images.parquet                       one row per cached image: where its latents lie
    CACHE/prompts.parquet                      one row per distinct prompt: where its embeddings lie
    CACHE/shards.parquet                       one row per shard, which is the shard's number
    CACHE/sources.parquet                      one row per cached image: where it comes from; only writing needs it
    CACHE/latents/HHHHxWWWW-NNNNN.safetensors  one tensor "latents" (N, C, h, w) of images of H × W pixels
    CACHE/text/NNNNN.safetensors               "prompt_embeds" (N, L, D) and "pooled_prompt_embeds" (N, P)

Beside each shard lies a manifest of the same name with ``.json`` behind it, written last: a shard without one is not
finished. Files hold no time stamps; their bytes depend on the data and the settings alone.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa

from latentreward.contracts import LatentSpace
from latentreward.data.images import ExifOrientation
from latentreward.errors import InputError
from latentreward.storage import digests

VERSION = 1

PLAN = "plan.json"
PAIRS, IMAGES, PROMPTS = "pairs.parquet", "images.parquet", "prompts.parquet"
SHARDS, SOURCES = "shards.parquet", "sources.parquet"
LATENTS_FOLDER, TEXT_FOLDER = "latents", "text"
LATENTS, PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS = "latents", "prompt_embeds", "pooled_prompt_embeds"
"""Names of the tensors in a shard."""
TEMPORARY = ".tmp"
"""End of the name of a file that is being written."""

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

``prompt``, ``image_a`` and ``image_b`` of a pair are row numbers of the prompts' and the images' table; ``shard`` is a
row number of the shards' table and ``row`` a row of that shard. ``height`` and ``width`` are pixels as encoded, null
for text. ``batch`` numbers the images of a shard that are encoded together. ``label_a`` is null for unlabelled pairs;
``shard`` and ``row`` of a prompt are null where prompts are not cached. ``name`` is the path below the cache's folder.
``side`` is ``a`` or ``b`` of row ``reader_row`` of the reader.
"""


def latents_name(height: int, width: int, number: int) -> str:
    """Path below the cache's folder of the ``number``-th shard of images of ``height`` × ``width`` pixels."""
    return f"{LATENTS_FOLDER}/{height:04d}x{width:04d}-{number:05d}.safetensors"


def text_name(number: int) -> str:
    """Path below the cache's folder of the ``number``-th shard of text embeddings."""
    return f"{TEXT_FOLDER}/{number:05d}.safetensors"


def manifest_name(shard_name: str) -> str:
    """Path of the manifest of a shard."""
    return f"{shard_name}.json"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def digest(value: Any) -> str:
    """Hash (32 hexadecimal digits) of what can be put as JSON."""
    return digests.digest([canonical_json(value)])


@dataclass(frozen=True)
class TextSpec:
    """Text embeddings of a cache.

    Attributes:
        fingerprint: See :func:`latentreward.encoders.fingerprint.text_fingerprint`.
        num_tokens: L of ``prompt_embeds`` (N, L, D).
        token_dim: D.
        pooled_dim: P of ``pooled_prompt_embeds`` (N, P).
        dtype: Precision that the text encoders ran in.
        batch_size: Prompts encoded together.
        prompts_per_shard: Most prompts of one shard.
    """

    fingerprint: str
    num_tokens: int
    token_dim: int
    pooled_dim: int
    dtype: CacheDtype
    batch_size: int
    prompts_per_shard: int


@dataclass(frozen=True)
class CacheSpec:
    """Everything besides the data that decides the bytes of a cache.

    Attributes:
        origin: ``vae`` for images encoded here; otherwise the published cache that the latents were taken from.
        vae: See :func:`latentreward.encoders.fingerprint.vae_fingerprint`; None for latents from elsewhere.
        vae_dtype: Precision that the VAE ran in; None likewise.
        latent_space: Space of the latents.
        posterior: Whether latents are a sample or the mode of the VAE's posterior; None likewise.
        seed: Seed of the posterior samples.
        dtype: Stored precision of latents and embeddings.
        size: (height, width) in pixels that all images come to; None with buckets.
        buckets: (height, width) of each bucket; None with one size.
        resize: How images come to their size, see ``latentreward.data.images.PixelLoader``; None for latents from
            elsewhere.
        cross_bucket: What happens to a pair whose images fall into different buckets.
        min_pixels: Smaller images were left out.
        batch_size: Images encoded together.
        images_per_shard: Most images of one shard.
        text: Text embeddings; None if there are none.
        exif: Whether images were turned upright by their EXIF orientation; None for latents from elsewhere, and where
            an earlier version wrote the cache, which ignored it.
    """

    origin: str
    vae: str | None
    vae_dtype: str | None
    latent_space: LatentSpace
    posterior: str | None
    seed: int
    dtype: CacheDtype
    size: tuple[int, int] | None
    buckets: tuple[tuple[int, int], ...] | None
    resize: str | None
    cross_bucket: str
    min_pixels: int
    batch_size: int
    images_per_shard: int
    text: TextSpec | None = None
    exif: ExifOrientation | None = None

    @property
    def hash(self) -> str:
        """Hash of all fields."""
        return digest(self.record())

    def record(self) -> dict[str, Any]:
        """Plain values, without ``exif`` where it is not known: hashes of earlier versions stay."""
        return {name: value for name, value in asdict(self).items() if name != "exif" or value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The spec that ``dataclasses.asdict`` and JSON made ``values`` of."""
        values = dict(values)
        values["latent_space"] = LatentSpace(**values["latent_space"])
        values["text"] = None if values["text"] is None else TextSpec(**values["text"])
        values["size"] = None if values["size"] is None else tuple(values["size"])
        values["buckets"] = None if values["buckets"] is None else tuple(map(tuple, values["buckets"]))
        return cls(**values)


@dataclass(frozen=True)
class CachePlan:
    """Content of ``plan.json``.

    Attributes:
        spec: Settings.
        data: What the pairs come from: kind of reader, number of rows, hash of their prompts.
        tables: SHA-256 of each table's file.
        pairs: Number of pairs kept.
        images: Number of images to cache; an image in two buckets counts twice.
        prompts: Number of distinct prompts, with the empty one where embeddings are cached.
        dropped: Pairs left out in planning, by reason.
        version: Of the layout.
    """

    spec: CacheSpec
    data: dict[str, Any]
    tables: dict[str, str]
    pairs: int
    images: int
    prompts: int
    dropped: dict[str, int] = field(default_factory=dict)
    version: int = VERSION

    @property
    def hash(self) -> str:
        """Hash of the settings, the data and the tables; each shard's manifest names it."""
        return digest({name: value for name, value in self._record().items() if name != "dropped"})

    @property
    def empty_prompt(self) -> int | None:
        """Row of the empty prompt in the prompts' table; None where embeddings are not cached."""
        return None if self.spec.text is None else 0

    def to_json(self) -> str:
        """Text of ``plan.json``."""
        return canonical_json({**self._record(), "spec_hash": self.spec.hash, "plan_hash": self.hash})

    def _record(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.record()}


@dataclass(frozen=True)
class ShardManifest:
    """Content of the JSON file beside a shard.

    Attributes:
        count: Rows of the shard.
        sha256: Of the shard's file.
        spec_hash: Hash of the settings.
        plan_hash: Hash of the plan.
        unreadable: Row of the shard → why its image could not be read; such rows hold zeros, and their pairs are not to
            be used.
    """

    count: int
    sha256: str
    spec_hash: str
    plan_hash: str
    unreadable: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Text of the file."""
        return canonical_json(asdict(self))


def read_plan(folder: Path) -> CachePlan:
    """Read ``plan.json`` of a cache.

    Raises:
        InputError: If there is none, it is damaged, or its layout has another version.
    """
    path = folder / PLAN
    if not path.is_file():
        raise InputError(f"{folder} is no cache: it has no {PLAN}; run `latentreward cache` or check the path")
    values = _read_json(path)
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
        InputError: If it is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; run `latentreward cache` again with the same settings")
    try:
        values = _read_json(path)
        values["unreadable"] = {int(row): str(reason) for row, reason in values["unreadable"].items()}
        return ShardManifest(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged; run `latentreward cache` again with the same settings") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run `latentreward cache` again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object; run `latentreward cache` again")
    return values
