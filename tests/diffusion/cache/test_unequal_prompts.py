"""Caches of prompts with unequal numbers of tokens, without a pooled vector, and of latents with a time axis."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.apps.cli import main
from latentreward.core.contracts import ImageRef
from latentreward.core.running import pair_generator
from latentreward.data import PixelLoader
from latentreward.diffusion.cache.datamodule import CachedPairDataset, CachedPairs, CacheIndex
from latentreward.diffusion.cache.store import IMAGES, PROMPTS, read_plan
from tests.diffusion.cache.writing import row, stored, table, write_image, write_rows
from tests.diffusion.families.twins import QUICK, TWINS
from tests.marks import rotated_after
from tests.unequal_prompts import MOST, clip_encoder, letter_states

PROMPT_TEXTS = ("a cat", "", "two dogs, and much more than fits", "dog", "a", "bird", "owl")
OPTIONS = (
    "--reader=latentreward.data.HPDv3Reader",
    "--reader.split=train",
    "--encoder=tests.unequal_prompts.ClipsAndStates",
    "--images.size=16",
    "--images_per_shard=8",
    "--num_workers=0",
    "--dtype=float32",
    "--device=cpu",
)


def arguments(output: Path, data: Path, *settings: str) -> list[str]:
    return ["cache", str(output), *OPTIONS, f"--reader.root={data}", *settings]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and its cache."""
    folder = tmp_path_factory.mktemp("unequal")
    for number in range(7):
        write_image(folder / f"data/images/{number}.jpg", number, (16, 16))
    pairs = [row(text, f"images/{n}.jpg", f"images/{(n + 1) % 7}.jpg") for n, text in enumerate(PROMPT_TEXTS)]
    write_rows(folder / "data", pairs)
    main(arguments(folder / "cache", folder / "data"))
    return folder / "data", folder / "cache"


def test_files_hold_the_tokens_of_the_prompts_and_nothing_else(written: tuple[Path, Path]) -> None:
    cache, encoder = written[1], letter_states()
    for prompt, found in zip(table(cache, PROMPTS), stored(cache, "text", "prompt_embeds"), strict=True):
        assert len(found) == min(len(prompt["prompt"]) + 1, MOST)
        torch.testing.assert_close(found, encoder([prompt["prompt"]]).prompt_embeds[0], rtol=1e-5, atol=1e-6)
    assert read_plan(cache).spec.text.masked and len(list(cache.glob("text-*"))) == 2
    assert load_file(cache / "text-00000.safetensors").keys() == {"prompt_lengths", "prompt_embeds"}


def test_latents_have_a_time_axis_and_are_the_encoder_s_own(written: tuple[Path, Path]) -> None:
    data, cache = written
    for image, found in zip(table(cache, IMAGES)[:3], stored(cache), strict=False):
        key = image["image_key"]
        pixels = PixelLoader(16, 16, "center_crop")(ImageRef(key, path=data / key)).unsqueeze(0)
        noise = torch.randn(4, 1, 8, 8, generator=pair_generator(0, "posterior", 0, "", key))
        torch.testing.assert_close(found, clip_encoder().encode(pixels, noise[None])[0], rtol=1e-5, atol=1e-5)


def test_a_batch_is_padded_to_its_longest_prompt(written: tuple[Path, Path]) -> None:
    index, encoder = CacheIndex(written[1]), letter_states()
    for numbers in ([0, 3, 4], [2, 0], [6], list(range(7))):
        batch = CachedPairDataset(index, CachedPairs(index).rows).__getitems__(numbers)
        wanted, found, uncond = encoder(batch.prompts), batch.conditioning, batch.uncond
        assert batch.chosen.shape == (len(numbers), 4, 1, 8, 8)
        assert found.pooled_prompt_embeds is None and uncond.pooled_prompt_embeds is None
        assert torch.equal(found.prompt_mask, wanted.prompt_mask)
        kept = wanted.prompt_mask.unsqueeze(-1)
        torch.testing.assert_close(found.prompt_embeds, wanted.prompt_embeds * kept, rtol=1e-5, atol=1e-6)
        assert uncond.prompt_embeds.shape == (1, 1, 6) and uncond.prompt_mask.all()
        torch.testing.assert_close(uncond.prompt_embeds, encoder([""]).prompt_embeds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("twin", rotated_after(3, sorted(TWINS, key=lambda name: name not in QUICK)))
def test_tokenisation_tells_the_lengths_of_a_family_s_prompts(twin: str) -> None:
    encoder = TWINS[twin].source().load().text_encoder
    texts = ["", "a cat", "two dogs on a hill in the rain", "word " * 2000]
    with torch.no_grad():
        encoded = encoder(texts)
    lengths = [encoded.prompt_embeds.shape[1]] * 4 if not encoder.masked else encoded.prompt_mask.sum(dim=1).tolist()
    assert encoder.count_tokens(texts) == lengths
    assert max(lengths) <= encoder.num_tokens
