"""Batches of a cache: the right rows, turned by the one rule, without what cannot be used."""

import multiprocessing
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from latentreward.core.contracts import ImageRef, PreferenceBatch, PreferencePair
from latentreward.core.errors import InputError
from latentreward.data import LoadedPair, collate_pairs
from latentreward.data.loading import as_is
from latentreward.diffusion.cache.dataset import CachedPairDataset
from latentreward.diffusion.cache.index import CachedPairs, CacheIndex
from latentreward.diffusion.cache.layout import IMAGES, LATENTS_FOLDER, PAIRS, manifest_name, text_name
from tests.diffusion.cache.written_caches import SPACE, latents_of, spec, text_of, write_cache
from tests.processes import FORKS

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
    numbers = [3, 0, 4, 2, 1]
    batch = dataset(folder).__getitems__(numbers)
    prompts, kind = ("", "a red cube", "a blue ball"), getattr(torch, dtype)
    wanted = collate_pairs(
        [
            LoadedPair(
                PreferencePair(
                    f"pair{number:02d}",
                    prompts[pair["prompt"]],
                    ImageRef(f"img{pair['image_a']:02d}"),
                    ImageRef(f"img{pair['image_b']:02d}"),
                    pair["label_a"],
                    pair.get("weight", 1.0),
                ),
                latents_of(pair["image_a"], (16, 24), kind),
                latents_of(pair["image_b"], (16, 24), kind),
            )
            for number, pair in ((number, PAIRS_OF_FIVE[number]) for number in numbers)
        ]
    )
    for name in ("pair_ids", "prompts", "chosen_keys", "rejected_keys"):
        assert getattr(batch, name) == getattr(wanted, name)
    for name in ("chosen", "rejected", "label", "weight"):
        torch.testing.assert_close(getattr(batch, name), getattr(wanted, name), rtol=0, atol=0)
    assert batch.latent_space == SPACE
    assert batch.conditioning is not None
    assert batch.uncond is not None
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


@pytest.mark.slow
@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), FORKS], ids=["fork", "forkserver"])
def test_workers_give_the_same_batches(context: BaseContext, tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6)
    data = dataset(folder)
    loader = DataLoader(data, 2, num_workers=1, collate_fn=as_is, multiprocessing_context=context)
    for batch, wanted in zip(loader, (data[[0, 1]], data[[2, 3]], data[[4]]), strict=True):
        assert type(batch) is PreferenceBatch
        assert batch.pair_ids == wanted.pair_ids
        assert torch.equal(batch.rejected, wanted.rejected)
        assert torch.equal(batch.label, wanted.label)


def test_pairs_with_an_unreadable_image_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6, unreadable=[0, 4])
    pairs = CachedPairs(CacheIndex(folder))
    assert pairs.pair_ids() == ["pair01", "pair04"]
    assert pairs.skipped == {"unreadable image": 3}
    assert pairs[0].prompt == "a blue ball"
    assert pairs.labelled().tolist() == [True, True]


def test_pairs_of_two_sizes_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 3 + [(16, 32)] * 3)
    pairs = CachedPairs(CacheIndex(folder))
    assert pairs.pair_ids() == ["pair00", "pair01", "pair02", "pair04"]
    assert pairs.skipped == {"images of two sizes": 1}


def test_a_missing_shard_stops_or_leaves_its_pairs_out(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6, per_shard=2)
    (folder / manifest_name(f"{LATENTS_FOLDER}/0016x0016-00002.safetensors")).unlink()
    with pytest.raises(InputError, match=r"1 of 5 shards are not written, first latents/0016x0016-00002.safetensors"):
        CacheIndex(folder)
    pairs = CachedPairs(CacheIndex(folder, on_missing="skip"))
    assert pairs.pair_ids() == ["pair00", "pair01"]
    assert pairs.skipped == {"shard not written yet": 3}
    batch = CachedPairDataset(pairs.index, pairs.rows).__getitems__([1, 0])
    assert torch.equal(batch.chosen[0], latents_of(1, (16, 16)))


def test_no_pair_is_used_without_the_shard_of_the_empty_prompt(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6, per_shard=2)
    (folder / manifest_name(text_name(0))).unlink()  # prompt 2 is in another one
    pairs = CachedPairs(CacheIndex(folder, on_missing="skip"))
    assert (len(pairs), pairs.skipped) == (0, {"shard not written yet": 5})


def test_an_index_without_shards_is_one_line(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", PAIRS_OF_FIVE, [(16, 16)] * 6)
    for path in folder.glob("*/*"):
        path.unlink()
    for on_missing in ("raise", "skip"):
        with pytest.raises(InputError, match="3 of 3 shards are not written") as error:
            CacheIndex(folder, on_missing)
        assert "\n" not in str(error.value)
        assert "on_missing" not in str(error.value)  # which would not help


def test_damage_is_one_line(tmp_path: Path) -> None:
    def written(name: str) -> Path:
        return write_cache(tmp_path / name, PAIRS_OF_FIVE, [(16, 16)] * 6)

    folder = written("table")
    (folder / PAIRS).write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"pairs.parquet is damaged"):
        CacheIndex(folder)
    folder = written("no table")
    (folder / IMAGES).unlink()
    with pytest.raises(InputError, match=r"images.parquet is missing"):
        CacheIndex(folder)
    folder = written("truncated")
    shard = folder / f"{LATENTS_FOLDER}/0016x0016-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match="bytes, but its header says"):
        CacheIndex(folder)
    one, other = written("one"), write_cache(tmp_path / "other", PAIRS_OF_FIVE[:4], [(16, 16)] * 6)
    name = manifest_name(f"{LATENTS_FOLDER}/0016x0016-00001.safetensors")
    (one / name).write_bytes((other / name).read_bytes())
    with pytest.raises(InputError, match="belongs to another plan"):
        CacheIndex(one)
    folder = write_cache(tmp_path / "wide", PAIRS_OF_FIVE, [(16, 32)] * 6)
    shards = sorted((folder / LATENTS_FOLDER).glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(InputError, match="holds no latents of shape"):
        CacheIndex(folder)
