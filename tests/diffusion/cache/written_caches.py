"""Small caches written row by row from the layout alone, as the oracle of what reading must give back."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from latentreward.core.contracts import LatentSpace
from latentreward.diffusion.cache.layout import (
    IMAGES,
    PAIRS,
    PLAN,
    PROMPTS,
    SCHEMAS,
    SHARDS,
    CachePlan,
    CacheSpec,
    ShardManifest,
    TextSpec,
    latents_name,
    manifest_name,
    schema_of,
    text_name,
)

SPACE = LatentSpace(channels=4, downscale=8, scaling_factor=0.18215)
TEXT = TextSpec("text-1", 3, 8, 5, "float32", 4, 4)


def latents_of(number: int, size: tuple[int, int], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Latents of image ``number``."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(SPACE.channels, size[0] // 8, size[1] // 8, generator=generator).to(dtype)


def text_of(number: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of prompt ``number``."""
    generator = torch.Generator().manual_seed(10_000 + number)
    return torch.randn(3, 8, generator=generator).to(dtype), torch.randn(5, generator=generator).to(dtype)


def spec(dtype: str = "float16", with_text: bool = True, **changes: Any) -> CacheSpec:
    """Settings of a cache."""
    values = {
        "origin": "vae",
        "vae": "vae-1",
        "vae_dtype": "float32",
        "latent_space": SPACE,
        "posterior": "mode",
        "seed": 0,
        "dtype": dtype,
        "size": None,
        "buckets": ((16, 16), (16, 32)),
        "resize": "center_crop",
        "cross_bucket": "drop",
        "min_pixels": 0,
        "batch_size": 4,
        "images_per_shard": 4,
        "text": TEXT if with_text else None,
    }
    return CacheSpec(**{**values, **changes})


def write_cache(
    folder: Path,
    pairs: Sequence[dict[str, Any]],
    sizes: Sequence[tuple[int, int]],
    prompts: Sequence[str] = ("", "a red cube", "a blue ball"),
    spec: CacheSpec | None = None,
    unreadable: Sequence[int] = (),
    per_shard: int = 4,
) -> Path:
    """Write a cache of images ``img00`` ….

    Args:
        folder: Where.
        pairs: ``image_a``, ``image_b``, ``source_images`` (numbers of images), and more columns of the pairs' table
            if not the defaults.
        sizes: Pixels of each image.
        prompts: Texts; the empty one first.
        spec: Settings.
        unreadable: Numbers of images that could not be read.
        per_shard: Images or prompts of one shard.
    """
    spec = spec or globals()["spec"]()
    dtype = getattr(torch, spec.dtype)
    shards: list[dict[str, Any]] = []
    contents: list[tuple[dict[str, torch.Tensor], dict[int, str]]] = []
    places: dict[int, tuple[int, int]] = {}
    for size in sorted(set(sizes)):
        mine = [number for number, other in enumerate(sizes) if other == size]
        for count, start in enumerate(range(0, len(mine), per_shard)):
            numbers = mine[start : start + per_shard]
            places |= {number: (len(shards), row) for row, number in enumerate(numbers)}
            shards.append(_shard(latents_name(*size, count), "latents", *size, len(numbers)))
            bad = {row: "truncated" for row, number in enumerate(numbers) if number in unreadable}
            contents.append(({"latents": torch.stack([latents_of(n, size, dtype) for n in numbers])}, bad))
    text_places: list[tuple[int | None, int | None]] = [(None, None)] * len(prompts)
    for count, start in enumerate(range(0, len(prompts) if spec.text else 0, per_shard)):
        numbers = list(range(start, min(start + per_shard, len(prompts))))
        text_places[start : start + per_shard] = [(len(shards), row) for row in range(len(numbers))]
        shards.append(_shard(text_name(count), "text", None, None, len(numbers)))
        embeds, pooled = zip(*(text_of(number, dtype) for number in numbers), strict=True)
        names = ("prompt_embeds", "pooled_prompt_embeds")
        contents.append((dict(zip(names, (torch.stack(embeds), torch.stack(pooled)), strict=True)), {}))
    defaults = dict.fromkeys(SCHEMAS[PAIRS].names) | {"prompt": 1, "label_a": 1.0, "weight": 1.0, "split": "train"}
    rows = {
        PAIRS: [
            defaults | {"pair_id": f"pair{number:02d}", "source": "test"} | pair for number, pair in enumerate(pairs)
        ],
        IMAGES: [
            {
                "image_key": f"img{n:02d}",
                "height": h,
                "width": w,
                "shard": places[n][0],
                "row": places[n][1],
                "batch": 0,
            }
            for n, (h, w) in enumerate(sizes)
        ],
        PROMPTS: [
            {"prompt": text, "shard": shard, "row": row}
            for text, (shard, row) in zip(prompts, text_places, strict=True)
        ],
        SHARDS: shards,
    }
    folder.mkdir(parents=True)
    tables = {}
    for name, records in rows.items():
        schema = schema_of(name, edits=any("source_images" in pair for pair in pairs))
        parquet.write_table(pa.Table.from_pylist(records, schema=schema), folder / name)
        tables[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    plan = CachePlan(spec, {"reader": "test", "rows": len(pairs)}, tables, len(pairs), len(sizes), len(prompts))
    (folder / PLAN).write_text(plan.to_json())
    for shard, (tensors, bad) in zip(shards, contents, strict=True):
        path = folder / shard["name"]
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = ShardManifest(shard["count"], sha256, spec.hash, plan.hash, bad)
        (folder / manifest_name(shard["name"])).write_text(manifest.to_json())
    return folder


def _shard(name: str, kind: str, height: int | None, width: int | None, count: int) -> dict[str, Any]:
    return {"name": name, "kind": kind, "height": height, "width": width, "count": count}
