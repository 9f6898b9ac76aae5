"""Own pictures that can be read, and pairs of them: by file name, all against all, or from ratings."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Literal

import numpy as np

from latentreward.core.contracts import like_prompt, sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import UnreadableTextError
from latentreward.data import ImageError, decode_image
from latentreward.data.image_lists import ListedImage, read_images
from latentreward.data.images import file_image, image_bytes
from latentreward.data.readers.base import MAX_PROMPT_CHARS, normalise_prompt
from latentreward.data.readers.folders import SIDES, find_pictures, read_caption, read_lines
from latentreward.data.readers.json_rows import parse_line, parse_text
from latentreward.data.readers.pair_rows import PairRowParser
from latentreward.data.readers.rows import RowReader

MOST_NAMED = 3  # files that a remark names; the rest are counted


@dataclass(frozen=True)
class Picture:
    """Picture that can be read."""

    path: str  # path relative to the folder, with ``/``
    content: str  # digest of the file's bytes; two files with the same bytes are the same picture
    caption: str  # text of the ``.txt`` file of the same name, or prompt in the table; empty without one


def check_folder(folder: Path) -> None:
    """Raise InputError if there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"folder: {folder} is not a folder; give the folder of your pictures")


def read_pictures(folder: Path, below: str = "") -> tuple[dict[str, Picture], list[str]]:
    """Find and decode all pictures of the subfolder ``below`` and its own, in the order of their names.

    Paths are relative to ``folder``. Pictures outside it, behind links, are not opened. Hidden files and folders are
    left out. Orientations by EXIF are applied later, as in training. In a folder that ``latentreward generate`` wrote,
    pictures and captions are those of its table; a caption of an edit carries the pictures that were edited.

    Returns:
        Name, which is the path below ``below`` without its ending → picture; and one line about each kind of file that
        was left out.
    """
    found: dict[str, Picture] = {}
    if not below and (rows := generated_rows(folder)):
        return _generated(folder, rows)
    images, unread = find_pictures(folder / below)
    unreadable, twice, uncaptioned = [], [], dict[str, list[str]]()
    for name, files in images.items():
        for number, file in enumerate(files):
            path = Path(file).relative_to(folder.name).as_posix() if not below else file
            if (told := parse_text(path)) != path:  # no file of pairs could name it
                unreadable.append(f"{told} (its name is not UTF-8)")
                continue
            reference = file_image(folder, path)
            try:
                decode_image(reference)
            except ImageError as error:
                unreadable.append(f"{path} ({error.problem})")
                continue
            if number and name in found:
                twice.append(path)
                continue
            assert reference.path is not None
            caption, problem = caption_of(reference.path, folder)
            if problem:
                uncaptioned.setdefault(problem, []).append(path)
            found[name] = Picture(path, digest([reference.path.read_bytes()]), caption)
    remarks = [f"{below}/: {remark}" if below else remark for remark in unread]
    remarks += [f"left out, cannot be read: {listed(unreadable)}"] if unreadable else []
    if twice:
        remarks.append(f"left out, another picture has the same name with another ending: {listed(twice)}")
    remarks += [f"no caption, since it {problem}: {listed(paths)}" for problem, paths in uncaptioned.items()]
    return found, remarks


def generated_rows(folder: Path) -> Sequence[ListedImage]:
    """Return the results in the table of a folder that ``latentreward generate`` wrote; none for other folders."""
    return read_images(str(folder)).rows if (folder / "generate.json").is_file() else ()


def _generated(folder: Path, rows: Sequence[ListedImage]) -> tuple[dict[str, Picture], list[str]]:
    found, unreadable = {}, []
    for row in rows:
        images = [file_image(folder, row.name), *sources_of(row.prompt)]
        try:
            for image in images:
                decode_image(image)
        except ImageError as error:
            unreadable.append(f"{row.name} ({error.problem})")
            continue
        caption = like_prompt(" ".join(row.prompt.split()), row.prompt)
        found[row.name] = Picture(row.name, digest([image_bytes(images[0])]), caption)
    return found, [f"left out, cannot be read: {listed(unreadable)}"] if unreadable else []


def caption_of(picture: Path, folder: Path) -> tuple[str, str]:
    """Read the ``.txt`` file beside a picture.

    Returns:
        Caption, empty without such a file; and what is wrong with one that is left out, or an empty text.
    """
    try:
        caption = " ".join((read_caption(picture.with_suffix(".txt"), folder) or "").split())
    except UnreadableTextError as error:
        return "", f"is {error.problem.partition(' at byte ')[0]}"
    if len(caption) > MAX_PROMPT_CHARS:  # the readers of later steps would refuse it
        return "", f"has more than {MAX_PROMPT_CHARS} characters"
    return caption, ""


def same_contents(pictures: Iterable[Picture]) -> list[str]:
    """List groups of files with the same bytes, as ``one.jpg = other.jpg``."""
    groups: dict[str, list[str]] = {}
    for picture in pictures:
        groups.setdefault(picture.content, []).append(picture.path)
    return [first_of(paths, " = ") for paths in groups.values() if len(paths) > 1]


def listed(names: list[str]) -> str:
    """Count some files, and name the first of them."""
    return f"{len(names)}: {first_of(names, ', ')}"


def first_of(names: list[str], joint: str) -> str:
    """Name the first of some files, joined by ``joint``, and count the others."""
    more = len(names) - MOST_NAMED
    return joint.join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def number_of(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``no pictures``, ``1 picture`` or ``2 pictures``."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


RATINGS = "ratings.jsonl"
LEAST = 20  # fewest pairs that are split and trained on; even these tell little
FEWEST = 2  # fewest pictures that can be rated
Pairing = Literal["auto", "names", "all"]


@dataclass(frozen=True)
class RatedPair:
    """Two pictures and which of them is preferred."""

    prompt: str  # caption of the pair; may be empty
    a: Picture  # first picture
    b: Picture  # second picture
    # 1 if ``a`` is preferred, 0 if ``b`` is, ½ for a tie or without an answer, or a probability between
    label: float = 0.5

    @property
    def names(self) -> tuple[str, str]:
        """Paths of both pictures."""
        return self.a.path, self.b.path


@dataclass(frozen=True)
class Pool:
    """Pictures that were chosen and rejected, without pairs: each of ``chosen`` wins against each of ``rejected``."""

    prompt: str  # caption that all of them have; empty without one
    chosen: Sequence[Picture]  # pictures that were chosen
    rejected: Sequence[Picture]  # pictures that were rejected

    def draw(self, number: int, rng: np.random.Generator) -> list[RatedPair]:
        """Draw pairs, each at most once, in which pictures of one side occur equally often, give or take one."""
        sides = [[side[place] for place in rng.permutation(len(side))] for side in (self.chosen, self.rejected)]
        chosen, rejected = sides
        if not chosen or not rejected:
            return []
        # Within `turn` pairs no pair of indices recurs; each further turn is shifted by one.
        turn = lcm(len(chosen), len(rejected))
        return [
            RatedPair(self.prompt, chosen[n % len(chosen)], rejected[(n + n // turn) % len(rejected)], 1.0)
            for n in range(min(number, len(chosen) * len(rejected)))
        ]


@dataclass(frozen=True)
class Collection:
    """What a folder holds."""

    how: str  # one line on how pairs are formed
    pairs: Sequence[RatedPair] = ()  # pairs by name or from ratings
    pools: Sequence[Pool] = ()  # pictures without pairs, instead of ``pairs``
    remarks: list[str] = field(default_factory=list)  # lines on what was left out

    @property
    def possible(self) -> int:
        """Number of pairs, or of all that the pools give."""
        return len(self.pairs) + sum(len(pool.chosen) * len(pool.rejected) for pool in self.pools)


def collect(folder: Path, pairing: Pairing = "auto") -> Collection:
    """Read the pairs of a folder: ``ratings.jsonl`` if it is there, else ``chosen/`` and ``rejected/``.

    Files that cannot be read, pairs of a picture with itself, and names on one side only are left out, with a remark.
    The pairing ``names`` pairs files of equal names; ``all`` lets each chosen picture win against each rejected one;
    ``auto`` takes names if at least half of them are on both sides.
    """
    check_folder(folder)
    sorted_ = all((folder / side).is_dir() for side in SIDES)
    if (folder / RATINGS).is_file():
        found = from_ratings(folder)
        if sorted_:
            found.remarks.append(f"{RATINGS} counts, not chosen/ and rejected/; move it away to use these")
    elif sorted_:
        found = from_sides(folder, pairing)
    else:
        raise InputError(_unsorted(folder))
    if found.possible < LEAST:
        told = "".join([number_of(found.possible, "pair"), *(f"; {remark}" for remark in found.remarks)])
        raise InputError(f"folder: {folder} gives {told}; give at least {LEAST}, better 100 or more")
    return found


def _unsorted(folder: Path) -> str:
    images, unread = find_pictures(folder)
    pictures = len(generated_rows(folder)) or sum(map(len, images.values()))
    lacks = (
        f"folder: {folder} has {number_of(pictures, 'picture')}, but not both chosen/ and rejected/, and no {RATINGS}"
    )
    remedy = f"sort pictures into these two, or rate two or more with `latentreward taste {folder} --rate`"
    return "; ".join([lacks, *unread, remedy])


def from_sides(folder: Path, pairing: Pairing) -> Collection:
    """Read ``chosen/`` and ``rejected/``; see :func:`collect`."""
    sides, remarks = {}, []
    for side in SIDES:
        sides[side], told = read_pictures(folder, side)
        remarks += told
        if not sides[side]:
            problem = "; ".join([f"folder: {folder / side} has no pictures that can be read", *told])
            raise InputError(f"{problem}; put the {side} pictures there")
    chosen, rejected = sides.values()
    if same := same_contents([*chosen.values(), *rejected.values()]):
        remarks.append(f"files with the same bytes count as one picture: {listed(same)}")
    both = chosen.keys() & rejected.keys()
    if pairing == "names" or (pairing == "auto" and len(both) >= min(len(chosen), len(rejected)) / 2):
        if lonely := sorted(chosen.keys() ^ rejected.keys()):
            remarks.append(f"left out, only on one side: {listed(lonely)}")
        named = [(name, chosen[name], rejected[name]) for name in sorted(both)]
        if differing := [name for name, a, b in named if len({a.caption, b.caption} - {""}) > 1]:
            remarks.append(f"captions differ, that in chosen/ counts: {listed(differing)}")
        kept, told = without_self([RatedPair(a.caption or b.caption, a, b, 1.0) for _, a, b in named])
        return Collection("pairs by file name (--pairing all takes all against all)", kept, remarks=[*remarks, *told])
    return _all_against_all(chosen, rejected, remarks)


def _all_against_all(chosen: dict[str, Picture], rejected: dict[str, Picture], remarks: list[str]) -> Collection:
    contents = [{picture.content: picture for picture in side.values()} for side in (chosen, rejected)]
    if contradicting := contents[0].keys() & contents[1].keys():
        names = sorted(contents[0][one].path for one in contradicting)
        remarks = [*remarks, f"left out, both chosen and rejected: {listed(names)}"]
    one_side, other = ([picture for key, picture in side.items() if key not in contradicting] for side in contents)
    how = "file names do not match: each chosen picture is compared with rejected ones"
    captions: dict[str, tuple[str, list[Picture], list[Picture]]] = {}
    for side, pictures in enumerate((one_side, other)):
        for picture in pictures:
            entry = captions.setdefault(normalise_prompt(picture.caption), (picture.caption, [], []))
            entry[side + 1].append(picture)  # type: ignore[union-attr]
    pools = [Pool(*entry) for entry in captions.values() if entry[1] and entry[2]]
    if len(captions) > 1 and sum(len(pool.chosen) + len(pool.rejected) for pool in pools) < len(one_side + other) / 2:
        return Collection(
            f"{how}, of any caption: most captions are on one side only, so captions are not used",
            pools=[Pool("", one_side, other)],
            remarks=remarks,
        )
    if len(captions) > 1:
        how += " of the same caption"
        if lonely := sorted({entry[0] or "no caption" for entry in captions.values() if not (entry[1] and entry[2])}):
            remarks = [*remarks, f"left out, captions on one side only: {listed(lonely)}"]
    return Collection(how, pools=pools, remarks=remarks)


def without_self(pairs: Sequence[RatedPair]) -> tuple[list[RatedPair], list[str]]:
    """Leave out pairs of a picture with itself, or with a copy; return the others and a remark."""
    kept = [pair for pair in pairs if pair.a.content != pair.b.content]
    own = [f"{pair.a.path} and {pair.b.path}" for pair in pairs if pair.a.content == pair.b.content]
    return kept, [f"left out, a picture paired with itself: {listed(own)}"] if own else []


class RatingReader(RowReader):
    """Reader of a folder's ``ratings.jsonl`` that leaves lines out by number and reason; raises InputError without any.

    Pictures are found out later.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(RATINGS, "train", randomise_sides=False, on_error="skip")
        self.folder = folder
        self.left_out: list[str] = []  # number and reason of each line that was left out
        lines = ((f"{RATINGS}:{number}", number, parse_line(line)) for number, line in read_lines(folder / RATINGS))
        self.table = PairRowParser(self).table(lines)
        empty = f"file: {folder / RATINGS} has no lines left; give one JSON object per line"
        self.report(str(folder / RATINGS), "; ".join([empty, *self.told()]))

    def told(self) -> list[str]:
        """Return a line on what was left out, or nothing."""
        return [f"{RATINGS}: lines left out: {listed(self.left_out)}"] if self.left_out else []

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Note the line instead of counting it, since the log would tell the count again."""
        self.left_out.append(f"line {pair_id.rpartition(':')[2]} ({problem})")


def from_ratings(folder: Path) -> Collection:
    """Read ``ratings.jsonl``, a file as :class:`~latentreward.data.JSONLPairReader` takes it."""
    reader = RatingReader(folder)
    remarks = reader.told()
    pictures: dict[str, Picture] = {}
    unreadable: dict[str, str] = {}
    pairs, lost = [], 0
    for row in range(len(reader)):
        pair = reader[row]
        images = (pair.image_a, pair.image_b, *sources_of(pair.prompt))
        for image in images:
            key = image.image_key
            if key in pictures or key in unreadable:
                continue
            try:
                decode_image(image)
            except ImageError as error:
                unreadable[key] = f"{key or 'no path'} ({error.problem})"
                continue
            pictures[key] = Picture(key, digest([image_bytes(image)]), "")
        keys = [image.image_key for image in images]
        if pair.label_a is None or any(key in unreadable for key in keys):
            lost += 1
        else:
            first, second, label = pictures[keys[0]], pictures[keys[1]], pair.label_a
            winner_first = (second, first, 1.0) if label == 0 else (first, second, label)
            pairs.append(RatedPair(pair.prompt, *winner_first))
    if unreadable:
        remarks.append(f"pictures that cannot be read: {listed(list(unreadable.values()))}")
    if lost:
        remarks.append(f"left out, pairs without a label or a readable picture: {lost}")
    kept, told = without_self(pairs)
    return Collection(f"pairs of {RATINGS}", kept, remarks=[*remarks, *told])


def lines(parts: dict[str, list[RatedPair]]) -> str:
    """Return the pairs of all parts as lines for :class:`~latentreward.data.JSONLPairReader`."""
    seen: Counter[str] = Counter()
    texts = []
    for split, pairs in parts.items():
        for pair in pairs:
            name = f"{pair.a.content[:12]}-{pair.b.content[:12]}"
            seen[name] += 1
            line: dict[str, object] = {"pair_id": name if seen[name] == 1 else f"{name}-{seen[name]}", "split": split}
            line |= {"prompt": pair.prompt}
            if sources := sources_of(pair.prompt):
                line |= {"source_images": [source.image_key for source in sources]}
            if pair.label == 1:
                line |= {"chosen": pair.a.path, "rejected": pair.b.path}
            else:
                line |= {"image_a": pair.a.path, "image_b": pair.b.path, "label": pair.label}
            line |= {"contents": [pair.a.content, pair.b.content]}
            texts.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(texts)
