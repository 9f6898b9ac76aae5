"""A second world, which nobody here drew: emoji with their names, degraded or exchanged for others.

The pictures are those of the npm package ``emoji-datasource-google`` 16.0.0 (images: Apache License 2.0). They are not
shipped.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.digests import digest
from latentreward.tinyworld.captions import split_texts
from latentreward.tinyworld.pairs import Sketch, World
from latentreward.tinyworld.scenes import IMAGE_SIZE

VARIABLE = "EMOJI_PATH"
"""Variable of the environment that names the unpacked package."""
REMEDY = f"let {VARIABLE} name the unpacked folder `package` of `npm pack emoji-datasource-google@16.0.0`"
LEAST_GROUPS = 15
"""Fewest emoji of a category, so that a held-out split has two, which can be exchanged for each other."""
MOST_WORDS = 11
"""Most words of a name in a caption, besides the category and its colon; the tokenizer has place for 14 tokens."""
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
SIGNS = {*TONES, "FE0F", "200D", "2640", "2642", "27A1"}
"""Code points that make a variant: skin tones, presentation, joiner, female, male, facing right."""
PEOPLE = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}
"""Man and woman → person, boy and girl → child, old man and old woman → older person."""
SAME = {
    "1F478": "1F934",
    "1F57A": "1F483",
    "1F936": "1F385",
    "1F9D1-1F384": "1F385",
    "1FAC3": "1F930",
    "1FAC4": "1F930",
}
SAME |= {"1F46C": "1F46B", "1F46D": "1F46B", "1F9D1-1F91D-1F9D1": "1F46B"}
SAME |= {"1F9D1-2764-1F48B-1F9D1": "1F48F", "1F9D1-2764-1F9D1": "1F491"}
"""Other emoji that differ in gender alone: royalty, dancers, Santa, pregnant; holding hands; kiss, couple."""
KINDS = ("blur", "noise", "fade", "pixels")
LEAST_DEGREE = 0.2
"""Smallest degree of a degradation."""
ALIGNMENTS = (1.0, 0.5, 0.0)
"""Alignment of the emoji itself, of another one of the same category, and of one of another category."""


@dataclass(frozen=True)
class Emoji:
    """Picture with a caption."""

    text: str  # caption: category and name
    category: str  # first word of the category's name
    group: str  # code points that it shares with its variants in skin tone, gender and direction
    pixels: bytes  # ``(32, 32, 3)`` uint8, on white
    split: str = ""  # ``train``, ``validation`` or ``test``; variants, and emoji of equal pixels, share it


class EmojiWorld(World):
    """Emoji with captions from categories and names.

    Generators learn the splits ``train`` and ``validation``, together ``known``; rewards learn ``train`` alone, and no
    network sees ``test``.

    Args:
        folder: Unpacked package, with ``emoji.json`` and ``img/google/64``; by default the one that :data:`VARIABLE`
            names.

    Raises:
        InputError: If there is no folder, or it does not hold the package.
    """

    noiseless = ("test",)

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None and VARIABLE not in os.environ:
            raise InputError(f"the second world has no pictures; {REMEDY}")
        folder = folder or Path(os.environ[VARIABLE])
        try:
            found = _read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: no emoji are read ({first_line(error)}); {REMEDY}") from error
        self.settings = f"emoji {digest([repr(found)], 8)}"
        by_category = defaultdict[str, dict[str, list[Emoji]]](dict)
        for emoji in found:
            by_category[emoji.category].setdefault(emoji.group, []).append(emoji)
        self.splits = defaultdict[str, list[list[Emoji]]](list)  # split → emoji, each with its variants
        for groups in by_category.values():
            if len(groups) >= LEAST_GROUPS:
                for split, names in split_texts(groups, b"emoji").items():
                    self.splits[split] += [[replace(one, split=split) for one in groups[name]] for name in names]
        self.splits["known"] = self.splits["train"] + self.splits["validation"]
        texts = [*self.texts("known"), *self.texts("test")]
        self.words: tuple[str, ...] | None = tuple(sorted({word for text in texts for word in words_of(text)}))

    def texts(self, split: str) -> list[str]:
        """Return the distinct captions of a split."""
        return list(dict.fromkeys(emoji.text for variants in self.splits[split] for emoji in variants))

    def draw_caption(self, rng: np.random.Generator, split: str) -> Emoji:
        """Draw an emoji of a split, all equally likely, and one of its variants."""
        return _draw(self.splits[split], rng)

    def sketch(
        self,
        caption: Emoji,
        rng: np.random.Generator,
        mutation_shares: Sequence[float] = (0.45, 0.35, 0.2),
        clean_share: float = 0.45,
    ) -> Sketch:
        """Draw which emoji of the same split a picture shows, and how it is degraded.

        ``mutation_shares`` are the probabilities of the :data:`ALIGNMENTS`; ``clean_share`` is that of no degradation.
        """
        place, shown = int(rng.choice(len(mutation_shares), p=list(mutation_shares))), caption
        if place:
            others = [one for one in self.splits[caption.split] if one[0].group != caption.group]
            shown = _draw([one for one in others if (one[0].category == caption.category) == (place == 1)], rng)
        degree = 0.0 if rng.random() < clean_share else float(rng.uniform(LEAST_DEGREE, 1.0))
        kind, seed = KINDS[int(rng.integers(len(KINDS)))], int(rng.integers(2**31))
        pixels = np.frombuffer(shown.pixels, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
        draw = partial(degrade, pixels, kind, degree, seed) if degree else lambda: pixels
        return Sketch(ALIGNMENTS[place], 1.0 - degree, draw)


def _draw(emoji: Sequence[Sequence[Emoji]], rng: np.random.Generator) -> Emoji:
    variants = emoji[int(rng.integers(len(emoji)))]
    return variants[int(rng.integers(len(variants)))]


def _read(folder: Path) -> list[Emoji]:
    """Read all emoji and their variants in skin tone; those of equal pixels get one group."""
    found, owners, same = list[Emoji](), dict[bytes, str](), dict[str, str]()
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        category, group = entry["category"].split()[0].lower(), group_of(entry["unified"])
        for tones, variant in {"": entry, **entry.get("skin_variations", {})}.items():
            image = Image.open(folder / "img/google/64" / variant["image"]).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            shown = Image.alpha_composite(white, image).convert("RGB").resize((IMAGE_SIZE,) * 2, Image.Resampling.BOX)
            pixels = shown.tobytes()
            first = owners.setdefault(pixels, group)
            same[group] = same.get(first, first)
            text = caption_of(category, entry["name"], tones.split("-") if tones else ())
            found.append(Emoji(text, category, group, pixels))
    return [replace(emoji, group=same[emoji.group]) for emoji in found]


def group_of(code: str) -> str:
    """Return the code points without those of variants, e.g. 1F9D1-1F52C for a woman scientist of dark skin."""
    points = code.split("-")
    kept = "-".join([PEOPLE.get(point, point) for point in points if point not in SIGNS] or points[:1])
    return SAME.get(kept, kept)


def words_of(text: str) -> list[str]:
    """Split a text into words of ASCII letters and single digits, as the tokenizer does."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return re.findall(r"[a-z]+|\d", plain.lower())


def caption_of(category: str, name: str, tones: Sequence[str] = ()) -> str:
    """Return a caption such as ``animals: hamster face`` or ``people: woman scientist dark skin``."""
    skins = [word for tone in tones for word in (*TONES[tone].split(), "skin")]
    return " ".join([f"{category}:", *words_of(name)[: MOST_WORDS - len(skins)], *skins])


def degrade(pixels: np.ndarray, kind: str, degree: float, seed: int) -> np.ndarray:
    """Degrade a picture ``(32, 32, 3)``, uint8, by a degree in [0, 1]; the seed is that of noise.

    A kind's root mean square error is about 55 gray levels times the degree, on average over emoji.
    """
    image, size = Image.fromarray(pixels), Image.Resampling
    if kind == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(0.33 * math.exp(3 * degree))))
    if kind == "pixels":
        side = round(IMAGE_SIZE * (1 - 0.91 * degree))
        return np.asarray(image.resize((side, side), size.BOX).resize((IMAGE_SIZE, IMAGE_SIZE), size.NEAREST))
    if kind == "fade":
        return np.round(255 - (1 - 0.6 * degree) * (255.0 - pixels)).astype(np.uint8)
    noise = np.random.default_rng(seed).normal(0, 66 * degree, pixels.shape)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)
