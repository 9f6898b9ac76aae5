"""Emoji as a world: captions, variants, splits, and pictures that are worse the more they are degraded."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from latentreward.core.errors import InputError
from tools.emoji.world import KINDS, VARIABLE, EmojiWorld, caption_of, degrade, group_of
from tools.pretraining.tokenizer import build_tokenizer

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("codes", "group"),
    [
        (("1F9D1-200D-1F52C", "1F468-200D-1F52C", "1F469-1F3FF-200D-1F52C"), "1F9D1-1F52C"),
        (("1F9DD", "1F9DD-200D-2640-FE0F", "1F9DD-1F3FB-200D-2642-FE0F"), "1F9DD"),
        (("1F6B6", "1F6B6-200D-2640-FE0F-200D-27A1-FE0F"), "1F6B6"),
        (("1F385", "1F936", "1F9D1-200D-1F384"), "1F385"),
        (("27A1-FE0F",), "27A1"),
        (("2640-FE0F",), "2640"),
    ],
)
def test_variants_share_a_group(codes: tuple[str, ...], group: str) -> None:
    assert {group_of(code) for code in codes} == {group}


def test_captions_are_category_name_and_tones() -> None:
    assert caption_of("animals", "HAMSTER FACE") == "animals: hamster face"
    assert caption_of("flags", "Côte d’Ivoire Flag") == "flags: cote d ivoire flag"
    assert caption_of("people", "COUPLE", ("1F3FB", "1F3FE")) == "people: couple light skin medium dark skin"
    assert len(caption_of("people", "A " * 40, ("1F3FB",)).split()) == 12


def test_no_variant_and_no_equal_picture_is_in_two_splits(world: EmojiWorld) -> None:
    homes = defaultdict[str | bytes, set[str]](set)
    for split in SPLITS:
        for emoji in (emoji for variants in world.splits[split] for emoji in variants):
            assert emoji.split == split
            homes[emoji.group].add(split)
            homes[emoji.pixels].add(split)
    assert all(len(found) == 1 for found in homes.values())
    everything = world.splits["known"] + world.splits["test"]
    assert sorted(map(len, everything))[-2:] == [2, 6]  # red and another red, genies of two genders and three tones
    assert {variants[0].category for variants in everything} == {"flags", "smileys"}


def test_every_word_has_a_token_and_captions_fit(world: EmojiWorld) -> None:
    tokenizer = build_tokenizer(world.words)
    for text in [*world.texts("known"), *world.texts("test")]:
        assert len(tokenizer(text).input_ids) == len(text.split()) + 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_greater_degree_is_a_greater_error(kind: str, world: EmojiWorld) -> None:
    pixels = np.frombuffer(world.splits["train"][0][0].pixels, np.uint8).reshape(32, 32, 3)
    errors = [np.square(degrade(pixels, kind, degree, 0) - pixels.astype(float)).mean() for degree in (0.2, 0.5, 1.0)]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_sketches_know_degree_and_identity(world: EmojiWorld) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        emoji = world.draw_caption(rng, "test")
        sketch = world.sketch(emoji, rng)
        if sketch.quality == 1:
            shown = sketch.draw().tobytes()
            (category,) = {v[0].category for v in world.splits["test"] if shown in [one.pixels for one in v]}
            expected = 1.0 if shown == emoji.pixels else 0.5 if category == emoji.category else 0.0
            assert sketch.alignment == expected
        else:
            assert 0 <= sketch.quality <= 0.8
    shares = [world.sketch(emoji, rng, (0.0, 0.0, 1.0), 1.0) for _ in range(5)]
    assert {(one.alignment, one.quality) for one in shares} == {(0.0, 1.0)}


def test_a_missing_folder_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"^the second world has no pictures; let EMOJI_PATH name .*npm pack"):
        EmojiWorld()
    (tmp_path / "emoji.json").write_text('[{"name": "x"}]')
    with pytest.raises(InputError, match=r"no emoji are read \('category'\); let EMOJI_PATH name"):
        EmojiWorld(tmp_path)
