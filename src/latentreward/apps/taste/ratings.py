"""Ratings of pairs of own pictures: which pairs are shown, and the file that keeps the answers."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentreward.apps.taste.pairs import (
    FEWEST,
    RATINGS,
    Picture,
    RatedPair,
    listed,
    number_of,
    read_pictures,
    remarks_of,
    same_contents,
)
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import write_file
from latentreward.data.readers.base import normalise_prompt
from latentreward.data.readers.json_rows import parse_line

BLOCK = 8  # pictures that are compared with each other only, so that the split finds parts without common pictures
Answer = Literal["a", "b", "tie"]
RATED = "rated"  # key of a line's time, by which the lines of the page are told from others
KEPT = "the ratings so far are kept: free some space and run it again"


def pairs_to_show(pictures: Sequence[Picture], seed: int) -> list[RatedPair]:
    """List the pairs to show: first one of each picture, then further ones with other pictures of its block.

    Pictures of the same caption are compared; those whose caption no other picture has are compared with each other,
    without a caption. Blocks have up to :data:`BLOCK` pictures. Order and sides are
    random; ``a`` is shown on the left.
    """
    rng = np.random.default_rng(seed)
    captions = [normalise_prompt(picture.caption) for picture in pictures]
    common = {caption for caption, number in Counter(captions).items() if caption and number > 1}
    groups: dict[str, list[Picture]] = {}
    for picture, caption in zip(pictures, captions, strict=True):
        groups.setdefault(caption if caption in common else "", []).append(picture)
    blocks = []
    for caption, group in groups.items():
        # Not by `rng`: where a picture comes or goes, most of the others should stay in their blocks.
        order = sorted(group, key=lambda picture: digest([f"{seed} {picture.content}"]))
        for some in np.array_split(np.arange(len(order)), -(-len(order) // BLOCK)):
            blocks.append([*rounds([order[place] for place in some], order[0].caption if caption else "")])
    shown = []
    for turn in zip_longest(*blocks, fillvalue=[]):
        pairs = [pair for block in turn for pair in block]
        for place in rng.permutation(len(pairs)):
            one = pairs[place]
            shown.append(one if rng.random() < 0.5 else replace(one, a=one.b, b=one.a))
    return shown


def rounds(pictures: Sequence[Picture], prompt: str) -> Iterator[list[RatedPair]]:
    """Yield rounds of pairs in which each picture is once, at most, until each has met each other: a round robin."""
    around: list[Picture | None] = [*pictures, *([None] if len(pictures) % 2 else [])]
    half = len(around) // 2
    for _ in range(len(around) - 1):
        pairs = zip(around[:half], reversed(around[half:]), strict=True)
        yield [RatedPair(prompt, a, b) for a, b in pairs if a is not None and b is not None]
        around = [around[0], around[-1], *around[1:-1]]


class Ratings:
    """Answers to pairs, in the file ``ratings.jsonl`` of a folder of pictures.

    Each answer is on the disk before the next pair is shown. A file of earlier answers is continued. Another ``seed``
    shows other pairs. ``remarks`` are lines on pictures that were left out, and on a broken line.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        found, self.remarks = read_pictures(folder)
        same = same_contents(found.values())
        self.remarks += remarks_of({"files with the same bytes are shown once": same})
        different = [*{picture.content: picture for picture in reversed(found.values())}.values()][::-1]
        if len(different) < FEWEST:
            found_here = "; ".join([number_of(len(different), "different picture"), *self.remarks])
            raise InputError(f"folder: {folder} has {found_here}; give at least {FEWEST}")
        self.file = folder / RATINGS
        self.pairs = pairs_to_show(different, seed)  # all that can be shown
        self.pictures = {picture.path: picture for pair in self.pairs for picture in (pair.a, pair.b)}
        self._lines = self._read()

    @property
    def total(self) -> int:
        """Number of pairs that can be shown."""
        return len(self.pairs)

    @property
    def done(self) -> int:
        """Number of pairs, of those that can be shown, with an answer."""
        return self.total - len(self._open())

    @property
    def next(self) -> RatedPair | None:
        """Pair without an answer; None if all have one."""
        return next(iter(self._open()), None)

    def _open(self) -> list[RatedPair]:
        # However a line says who won.
        rated = {
            frozenset((line.get("image_a", line.get("chosen")), line.get("image_b", line.get("rejected"))))
            for line in self._lines
        }
        return [pair for pair in self.pairs if frozenset(pair.names) not in rated]

    def rate(self, names: Sequence[str], answer: Answer) -> bool:
        """Keep an answer to the pair that is shown; return False if ``names`` are not of that pair."""
        pair = self.next
        if pair is None or pair.names != tuple(names):
            return False
        line: dict[str, Any] = {"prompt": pair.prompt, "image_a": pair.a.path, "image_b": pair.b.path, "label": answer}
        line[RATED] = datetime.now(UTC).isoformat(timespec="seconds")
        # By a rename, as a link under the file's name may lead to a file of another kind.
        before = self.file.read_bytes() if self.file.is_file() else b""
        before += b"\n" if before[-1:] not in (b"", b"\n") else b""  # another program's last line
        write_file(self.file, before + (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"), KEPT)
        self._lines.append(line)
        return True

    def undo(self) -> bool:
        """Take the last answer back; return False if there is none that was given on the page."""
        if not self._lines or RATED not in self._lines[-1]:
            return False
        texts = [text for text in self.file.read_bytes().splitlines(keepends=True) if text.strip()]
        if not texts or parse_line(texts[-1]) != self._lines[-1]:  # another program has written to the file meanwhile
            return False
        write_file(self.file, b"".join(texts[:-1]), KEPT)
        self._lines.pop()
        return True

    def _read(self) -> list[dict[str, Any]]:
        content = self.file.read_bytes() if self.file.is_file() else b""
        texts = {n: text for n, text in enumerate(content.splitlines(keepends=True), start=1) if text.strip()}
        lines = {number: parse_line(text) for number, text in texts.items()}
        last = max(lines, default=0)
        if last and isinstance(lines[last], str) and not content.endswith(b"\n"):  # a kill or a full disk cut it off
            self.remarks.append(f"{RATINGS}: its last line is broken off and is left out")
            del texts[last], lines[last]
            write_file(self.file, b"".join(texts.values()), KEPT)
        if flaws := [f"line {number} ({line})" for number, line in lines.items() if isinstance(line, str)]:
            raise InputError(f"{self.file}: lines that cannot be read: {listed(flaws)}; correct or remove them")
        return [line for line in lines.values() if isinstance(line, dict)]
