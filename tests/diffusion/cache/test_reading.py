"""Batches of a cache: the right rows, turned by the one rule, without what cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.core.contracts import ImageRef, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import LoadedPair, collate_pairs
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CachedPairs, CacheIndex
from latentreward.diffusion.cache.store import IMAGES, PAIRS, SPEC, read_plan
from tests.diffusion.cache.written_caches import SPACE, latents_of, spec, text_of, write_cache

LABELS = [1.0, 0.0, 0.5, None, 0.3]
PAIRS_OF_FIVE = [
    {"image_a": 0, "image_b": 1, "label_a": LABELS[0], "prompt": 1, "weight": 0.5},
    {"image_a": 2, "image_b": 1, "label_a": LABELS[1], "prompt": 2},
    {"image_a": 4, "image_b": 3, "label_a": LABELS[2], "prompt": 1},
    {"image_a": 5, "image_b": 0, "label_a": LABELS[3], "prompt": 0},
    {"image_a": 3, "image_b": 5, "label_a": LABELS[4], "prompt": 2},
]


def dataset(folder: Path, **options: Any) -> CachedPairDataset:
    index = CacheIndex(folder)
    return CachedPairDataset(index, CachedPairs(index).rows, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_batch_is_what_collate_makes_of_its_pairs(dtype: str, tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 24)] * 6, spec=spec(dtype))
    numbers, prompts, kind = [3, 0, 4, 2, 1], ("", "a red cube", "a blue ball"), getattr(torch, dtype)
    batch, items = dataset(folder).__getitems__(numbers), []
    for number in numbers:
        pair, images = PAIRS_OF_FIVE[number], [PAIRS_OF_FIVE[number][f"image_{side}"] for side in "ab"]
        refs = [ImageRef(f"img{image:02d}") for image in images]
        more = pair["label_a"], pair.get("weight", 1.0)
        record = PreferencePair(f"pair{number:02d}", prompts[pair["prompt"]], *refs, *more)
        items.append(LoadedPair(record, *(latents_of(image, (16, 24), kind) for image in images)))
    wanted = collate_pairs(items)
    for name in ("pair_ids", "prompts", "chosen_keys", "rejected_keys"):
        assert getattr(batch, name) == getattr(wanted, name)
    for name in ("chosen", "rejected", "label", "weight"):
        torch.testing.assert_close(getattr(batch, name), getattr(wanted, name), rtol=0, atol=0)
    assert batch.latent_space == SPACE
    for row, number in enumerate(numbers):
        embeds, pooled = text_of(PAIRS_OF_FIVE[number]["prompt"], kind)
        assert torch.equal(batch.conditioning.prompt_embeds[row], embeds)
        assert torch.equal(batch.conditioning.pooled_prompt_embeds[row], pooled)
    assert torch.equal(batch.uncond.prompt_embeds[0], text_of(0, kind)[0])


def test_without_text_the_batch_brings_prompts_alone(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6, spec=spec(with_text=False))
    assert dataset(folder)[0].conditioning is None
    folder = write_cache(tmp_path / "text", PAIRS_OF_FIVE, [(16, 16)] * 6)
    assert dataset(folder, with_text=False)[0].conditioning is None
    assert dataset(folder)[0].conditioning is not None


def test_pairs_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    pairs = CachedPairs(CacheIndex(write_cache(tmp_path / "bad", PAIRS_OF_FIVE, [(16, 16)] * 6, unread=[0, 4])))
    assert (pairs.pair_ids(), pairs.skipped) == (["pair01", "pair04"], {"unreadable image": 3})
    assert pairs[0].prompt == "a blue ball" and pairs.labelled().tolist() == [True, True]
    uneven = CachedPairs(CacheIndex(write_cache(tmp_path / "two", PAIRS_OF_FIVE, [(16, 16)] * 3 + [(16, 32)] * 3)))
    assert uneven.pair_ids() == ["pair00", "pair01", "pair02", "pair04"]
    assert uneven.skipped == {"images of two sizes": 1}
    edits = [{"image_a": 0, "image_b": 1, "source_images": sources} for sources in ([2], [2, 3], [3], [1, 2])]
    index = CacheIndex(write_cache(tmp_path / "edits", edits, [(16, 16)] * 4, unread=[3]))
    assert CachedPairs(index).pair_ids() == ["pair00", "pair03"]


LATENTS, TEXT = "latents-00001.safetensors", "text-00000.safetensors"


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def exchange(path: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a file, whose metadata stay."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **tensors}, path, metadata)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no parquet": (lambda cache: (cache / PAIRS).write_bytes(b"no parquet"), PAIRS),
    "no table": (lambda cache: (cache / IMAGES).unlink(), IMAGES),
    "bytes of a table": (lambda cache: flip(cache / PAIRS), PAIRS),
    "missing": (lambda cache: (cache / LATENTS).unlink(), f"{LATENTS} is missing"),
    "shorter": (lambda cache: shorten(cache / LATENTS), f"{LATENTS} is damaged"),
    "empty": (lambda cache: (cache / LATENTS).write_bytes(b""), f"{LATENTS} is damaged"),
    "no safetensors": (lambda cache: (cache / TEXT).write_bytes(b"\xff" * 64), f"{TEXT} is damaged"),
    "foreign": (lambda cache: save_file({"latents": torch.zeros(2, 4, 2, 2).half()}, cache / LATENTS), "another cache"),
    "another's": (
        lambda cache: (cache / SPEC).write_text((cache / SPEC).read_text().replace("vae-1", "vae-2")),
        "another",
    ),
    "no record": (lambda cache: save_file(load_file(cache / LATENTS), cache / LATENTS, {"cache": "[]"}), LATENTS),
    "no rows": (
        lambda cache: save_file(load_file(cache / LATENTS), cache / LATENTS, {"cache": of_no_row(cache)}),
        LATENTS,
    ),
    "spec": (lambda cache: shorten(cache / SPEC), SPEC),
    "later": (
        lambda cache: (cache / SPEC).write_text((cache / SPEC).read_text().replace('"version": 2', '"version": 3')),
        SPEC,
    ),
    "no cache": (lambda cache: (cache / SPEC).unlink(), SPEC),
}


def of_no_row(cache: Path) -> str:
    """Record of a file that says why a row has no latents that it has not."""
    return json.dumps({"plan": read_plan(cache).name, "sha256": "", "unread": {"9": "truncated"}})


def flip(path: Path) -> None:
    """Turn one bit in the first third of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_whole_cache_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6)
    assert len(CacheIndex(folder).pairs) == 5
    damage, key = DAMAGE[kind]
    damage(folder)
    with pytest.raises(InputError) as error:
        CacheIndex(folder)
    assert key in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_files_of_the_oracle_are_those_of_the_format(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6, unread=[2])
    assert json.loads((folder / SPEC).read_text())["version"] == 2
    from latentreward.apps.cli import main

    main(["cache", str(folder), "--check"])
