"""Captions of the tiny world: their attributes, their texts, and splits without common captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from latentreward.core.errors import InputError

COLORS = ("red", "yellow", "green", "cyan", "blue", "purple")
BACKGROUNDS = ("black", "gray", "white")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
POSITIONS = ("top", "bottom", "left", "right")
RELATIONS = ("left of", "above")
KIND_SHARES = {"size": 0.25, "position": 0.25, "relation": 0.35, "two": 0.15}
"""Probability of each kind of caption when a caption is drawn."""


@dataclass(frozen=True)
class Caption:
    """Attributes of the picture that a caption asks for."""

    kind: str  # one of ``size``, ``position``, ``relation``, ``two``
    color: str  # colour of the (first) shape
    shape: str  # name of the (first) shape
    background: str  # name of the background
    detail: str = ""  # size, position or relation, depending on ``kind``; empty for ``two``
    other_color: str = ""  # colour of the second shape of a ``relation``; empty for other kinds
    other_shape: str = ""  # name of the second shape of a ``relation``; empty for other kinds

    @property
    def text(self) -> str:
        """Text of the caption, at most 12 words."""
        thing = f"{self.color} {self.shape}"
        subject = {
            "size": f"a {self.detail} {thing}",
            "position": f"a {thing} at the {self.detail}",
            "relation": f"a {thing} {self.detail} a {self.other_color} {self.other_shape}",
            "two": f"two {thing}{'es' if self.shape == 'cross' else 's'}",
        }[self.kind]
        return f"{subject} on a {self.background} background"

    @property
    def count(self) -> int:
        """Number of shapes that the caption asks for."""
        return 2 if self.kind in ("relation", "two") else 1


@lru_cache(maxsize=1)
def all_captions() -> dict[str, Caption]:
    """Return all captions by their texts: 144 of kind ``size``, 288 ``position``, 2,880 ``relation``, 72 ``two``."""
    found = [Caption("size", c, s, b, d) for c, s, b, d in product(COLORS, SHAPES, BACKGROUNDS, SIZES)]
    found += [Caption("position", c, s, b, d) for c, s, b, d in product(COLORS, SHAPES, BACKGROUNDS, POSITIONS)]
    found += [
        Caption("relation", c, s, b, d, c2, s2)
        for c, s, b, d, c2, s2 in product(COLORS, SHAPES, BACKGROUNDS, RELATIONS, COLORS, SHAPES)
        if c != c2
    ]
    found += [Caption("two", c, s, b) for c, s, b in product(COLORS, SHAPES, BACKGROUNDS)]
    return {caption.text: caption for caption in found}


def parse_caption(text: str) -> Caption:
    """Return the caption with a text."""
    if text not in all_captions():
        raise InputError(
            f"not a caption of the tiny world: {text!r}; see latentreward.tinyworld.captions.all_captions()"
        )
    return all_captions()[text]


@lru_cache(maxsize=1)
def caption_splits() -> dict[str, dict[str, tuple[Caption, ...]]]:
    """Return captions by split and kind: of each kind 10 % for ``test``, 10 % for ``validation``, 80 % for ``train``.

    The partition is fixed, so that generators and rewards are never trained on captions of the held-out splits.
    """
    splits: dict[str, dict[str, tuple[Caption, ...]]] = {"train": {}, "validation": {}, "test": {}}
    for kind in KIND_SHARES:
        texts = [text for text, caption in all_captions().items() if caption.kind == kind]
        for split, part in split_texts(texts, b"caption split").items():
            splits[split][kind] = tuple(all_captions()[text] for text in part)
    return splits


def split_texts(texts: Iterable[str], key: bytes) -> dict[str, list[str]]:
    """Partition texts by their digests under a key: 10 % for ``test``, 10 % for ``validation``, 80 % for ``train``."""
    ordered = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=key).digest())
    tenth = round(len(ordered) / 10)
    return {"train": ordered[2 * tenth :], "validation": ordered[tenth : 2 * tenth], "test": ordered[:tenth]}


def draw_caption(rng: np.random.Generator, split: str) -> Caption:
    """Draw a random caption of a split; kinds have the probabilities :data:`KIND_SHARES`."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    captions = caption_splits()[split][kind]
    return captions[int(rng.integers(len(captions)))]


def held_out_captions(number: int, seed: int, split: str = "test") -> list[str]:
    """Draw texts of a split's captions, possibly with repeats, as prompts for the evaluation of generators."""
    rng = np.random.default_rng([seed, 4])
    return [draw_caption(rng, split).text for _ in range(number)]


def judged_captions() -> list[str]:
    """Return the 192 held-out captions on which policies are judged."""
    return held_out_captions(192, 11)


def tuning_captions() -> list[str]:
    """Return 96 captions of the validation split, on which settings may be chosen: none of them is a judged one."""
    return held_out_captions(96, 12, "validation")
