"""Small caches written from the format alone, as the oracle of what reading must give back."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from latentreward.core.contracts import LatentSpace
from latentreward.diffusion.cache.sources import ImageSettings, TextSpec
from latentreward.diffusion.cache.store import IMAGES, PAIRS, PROMPTS, SPEC, CachePlan, CacheSpec
from latentreward.diffusion.cache.writing import SCHEMAS

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


def spec(
    dtype: str = "float16", with_text: bool = True, images: dict[str, Any] | None = None, **more: Any
) -> CacheSpec:
    """Settings of a cache."""
    settings = ImageSettings(**(images or {"buckets": ((16, 16), (16, 32)), "min_pixels": 0}))
    given = {"latent_space": SPACE, "vae": "vae-1", "text": TEXT if with_text else None, "posterior": "mode"}
    return CacheSpec(
        **{**given, "origin": "vae", "vae_dtype": "float32", "batch_size": 4, **more}, images=settings, dtype=dtype
    )


def write_cache(
    folder: Path,
    pairs: Sequence[dict[str, Any]],
    sizes: Sequence[tuple[int, int]],
    prompts: Sequence[str] = ("", "a red cube", "a blue ball"),
    spec: CacheSpec | None = None,
    unread: Sequence[int] = (),
    per_file: int = 4,
) -> Path:
    """Write a cache of images ``img00`` ….

    Args:
        folder: Where.
        pairs: ``image_a``, ``image_b``, ``source_images`` (numbers of images), and more columns of the pairs' table
            if not the defaults.
        sizes: Pixels of each image.
        prompts: Texts; the empty one first.
        spec: Settings.
        unread: Numbers of images that could not be read.
        per_file: Images or prompts of one file.
    """
    spec = spec or globals()["spec"]()
    dtype, files = getattr(torch, spec.dtype), dict[str, tuple[dict[str, torch.Tensor], list[int]]]()
    places = {}
    for size in sorted(set(sizes)):
        mine = [number for number, other in enumerate(sizes) if other == size]
        for numbers in (mine[at : at + per_file] for at in range(0, len(mine), per_file)):
            places |= dict.fromkeys(numbers, len(files))
            latents = torch.stack([latents_of(number, size, dtype) for number in numbers])
            files[f"latents-{len(files):05d}"] = {"latents": latents}, numbers
    for at in range(0, len(prompts) if spec.text else 0, per_file):
        embeds, pooled = zip(*(text_of(n, dtype) for n in range(len(prompts))[at : at + per_file]), strict=True)
        held = {"prompt_embeds": torch.stack(embeds), "pooled_prompt_embeds": torch.stack(pooled)}
        files[f"text-{at // per_file:05d}"] = held, []
    usual = dict.fromkeys(SCHEMAS[PAIRS]) | {
        "prompt": 1,
        "label_a": 1.0,
        "weight": 1.0,
        "split": "train",
        "source": "test",
    }
    rows = {
        PAIRS: [usual | {"pair_id": f"pair{n:02d}", "source_images": []} | pair for n, pair in enumerate(pairs)],
        IMAGES: [
            {"image_key": f"img{n:02d}", "height": h, "width": w, "side": "a", "file": places[n], "reader_row": n}
            for n, (h, w) in enumerate(sizes)
        ],
        PROMPTS: [{"prompt": text, "file": at // per_file if spec.text else None} for at, text in enumerate(prompts)],
    }
    folder.mkdir(parents=True)
    for name, records in rows.items():
        parquet.write_table(pa.Table.from_pylist(records, schema=pa.schema(SCHEMAS[name])), folder / name)
    tables = {name: sha256((folder / name).read_bytes()).hexdigest() for name in rows}
    plan = CachePlan(spec, {"reader": "test"}, tables, len(pairs), len(sizes), len(prompts))
    (folder / SPEC).write_text(plan.to_json())
    for name, (tensors, numbers) in files.items():
        bad = {str(row): "truncated" for row, number in enumerate(numbers) if number in unread}
        state = sha256(json.dumps(bad, sort_keys=True).encode())
        for kind in sorted(tensors):
            state.update(kind.encode() + tensors[kind].view(torch.uint8).numpy().tobytes())
        record = {"plan": plan.name, "unread": bad, "sha256": state.hexdigest()}
        save_file(tensors, folder / f"{name}.safetensors", {"cache": json.dumps(record)})
    return folder
