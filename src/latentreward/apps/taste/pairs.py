"""Own pictures that can be read, and pairs of them: by file name, all against all, or from ratings."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import UnreadableTextError
from latentreward.data import ImageError, decode_image
from latentreward.data.image_lists import ListedImage, read_images
from latentreward.data.images import file_image, image_bytes
from latentreward.data.readers.base import MAX_PROMPT_CHARS, normalise_prompt
from latentreward.data.readers.dataset_pairs import open_list
from latentreward.data.readers.folders import SIDES, find_pictures, read_caption
from latentreward.data.readers.json_rows import parse_text
from latentreward.data.readers.rows import PairRowParser, RowReader

RATINGS = "ratings.jsonl"
TABLES = (".csv", ".tsv", ".json", ".jsonl")
LEAST = 20  # fewest pairs that are split and trained on; even these tell little
FEWEST = 2  # fewest pictures that can be rated
MOST_NAMED = 3  # files that a remark names; the rest are counted
MOST_COMPARED = 20_000  # pairs of one caption in all against all; further ones would only take memory
EDIT = "left out, the result of an edit, which this command does not train on"


@dataclass(frozen=True)
class Picture:
    """Picture that can be read."""

    path: str  # path relative to the folder, with ``/``
    content: str  # digest of the file's bytes; two files with the same bytes are the same picture
    caption: str  # text of the ``.txt`` file of the same name, or prompt in the table; empty without one


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
class Collection:
    """Pairs of a folder."""

    how: str  # one line on how pairs are formed
    pairs: Sequence[RatedPair] = ()
    remarks: list[str] = field(default_factory=list)  # lines on what was left out


def check_folder(folder: Path) -> None:
    """Raise InputError if there is no such folder."""
    if not folder.is_dir():
        told = f"folder: {folder} is not a folder; give the folder of your pictures, or for training"
        raise InputError(f"{told} a table ({', '.join(TABLES)})")


def collect(
    folder: Path, columns: Mapping[str, str] | None = None, labels: Mapping[str, str | float] | None = None
) -> Collection:
    """Read the pairs of a table, or a folder: ``ratings.jsonl`` if it is there, else ``chosen/`` and ``rejected/``.

    Files that cannot be read, pairs of a picture with itself, and names on one side only are left out, with a remark.
    Files of equal names are paired if at least half of the names are on both sides; otherwise each chosen picture wins
    against each rejected one.
    """
    table = folder.suffix.lower() in TABLES and folder.is_file()
    if not table:
        check_folder(folder)
    sorted_ = all((folder / side).is_dir() for side in SIDES)
    if (ratings := folder if table else folder / RATINGS).is_file():
        found = from_ratings(ratings, columns, labels)
        if sorted_:
            found.remarks.append(f"{RATINGS} counts, not chosen/ and rejected/; move it away to use these")
    elif sorted_:
        found = from_sides(folder)
    else:
        images, unread = find_pictures(folder)
        pictures = number_of(len(generated_rows(folder)) or sum(map(len, images.values())), "picture")
        lacks = f"folder: {folder} has {pictures}, but not both chosen/ and rejected/, and no {RATINGS}"
        remedy = f"sort pictures into these two, or rate two or more with `latentreward taste {folder} --rate`"
        raise InputError("; ".join([lacks, *unread, remedy]))
    if len(found.pairs) < LEAST:
        told = "; ".join([number_of(len(found.pairs), "pair"), *found.remarks])
        raise InputError(f"folder: {folder} gives {told}; give at least {LEAST}, better 100 or more")
    if 0 < len(bare := [pair.a.path for pair in found.pairs if not pair.prompt]) < len(found.pairs):
        found.remarks.append(f"pairs without a caption, which are kept: {listed(bare)}")
    return found


def read_pictures(folder: Path, below: str = "") -> tuple[dict[str, Picture], list[str]]:
    """Find and decode all pictures of the subfolder ``below``, and tell what was left out, a line for each reason.

    Pictures outside ``folder``, behind links, are not opened. Hidden ones are left out. Orientations by EXIF are
    applied later, as in training. In a folder that ``latentreward generate`` wrote, pictures and captions are those of
    its table. A picture's key is its name without ending.
    """
    found, left = dict[str, Picture](), defaultdict[str, list[str]](list)
    rows = [] if below else [(row.name, row.name, row.prompt) for row in generated_rows(folder)]
    unread: list[str] = []
    if not rows:
        images, unread = find_pictures(folder / below)
        start = "" if below else folder.name
        rows = [(name, Path(file).relative_to(start).as_posix(), "") for name, some in images.items() for file in some]
    for name, path, prompt in rows:
        if (told := parse_text(path)) != path:  # no file of pairs could name it
            left["left out, cannot be read"].append(f"{told} (its name is not UTF-8)")
            continue
        if sources_of(prompt):
            left[EDIT].append(path)
            continue
        image = file_image(folder, path)
        try:
            decode_image(image)
        except ImageError as error:
            left["left out, cannot be read"].append(f"{path} ({error.problem})")
            continue
        if name in found:
            left["left out, another picture has the same name with another ending"].append(path)
            continue
        caption = " ".join(prompt.split())
        if not prompt and image.path is not None:
            caption, problem = caption_of(image.path, folder)
            if problem:
                left[f"no caption, since it {problem}"].append(path)
        found[name] = Picture(path, digest([image_bytes(image)]), caption)
    return found, [*(f"{below}/: {one}" if below else one for one in unread), *remarks_of(left)]


def generated_rows(folder: Path) -> Sequence[ListedImage]:
    """Return the results in the table of a folder that ``latentreward generate`` wrote; none for other folders."""
    return read_images(str(folder)).rows if (folder / "generate.json").is_file() else ()


def caption_of(picture: Path, folder: Path) -> tuple[str, str]:
    """Read the ``.txt`` file beside a picture; also return what is wrong with one that is left out."""
    try:
        caption = " ".join((read_caption(picture.with_suffix(".txt"), folder) or "").split())
    except UnreadableTextError as error:
        return "", f"is {error.problem.partition(' at byte ')[0]}"
    if len(caption) > MAX_PROMPT_CHARS:  # the readers of later steps would refuse it
        return "", f"has more than {MAX_PROMPT_CHARS} characters"
    return caption, ""


def remarks_of(left: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each reason for which some files are left out; reasons without files have none."""
    return [f"{reason}: {listed(names)}" for reason, names in left.items() if names]


def same_contents(pictures: Iterable[Picture]) -> list[str]:
    """List groups of files with the same bytes, as ``one.jpg = other.jpg``."""
    groups = defaultdict[str, list[str]](list)
    for picture in pictures:
        groups[picture.content].append(picture.path)
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


def from_sides(folder: Path) -> Collection:
    """Read ``chosen/`` and ``rejected/``; see :func:`collect`."""
    sides, remarks = [], []
    for side in SIDES:
        pictures, told = read_pictures(folder, side)
        if not pictures:
            problem = "; ".join([f"folder: {folder / side} has no pictures that can be read", *told])
            raise InputError(f"{problem}; put the {side} pictures there")
        sides.append(pictures)
        remarks += told
    chosen, rejected = sides
    same = same_contents([*chosen.values(), *rejected.values()])
    remarks += remarks_of({"files with the same bytes count as one picture": same})
    both = chosen.keys() & rejected.keys()
    if len(both) < min(len(chosen), len(rejected)) / 2:
        return _all_against_all(chosen.values(), rejected.values(), remarks)
    named = [(name, chosen[name], rejected[name]) for name in sorted(both)]
    left = {
        "left out, only on one side": sorted(chosen.keys() ^ rejected.keys()),
        "captions differ, that in chosen/ counts": [
            name for name, a, b in named if len({a.caption, b.caption} - {""}) > 1
        ],
    }
    kept, told = without_self([RatedPair(a.caption or b.caption, a, b, 1.0) for _, a, b in named])
    return Collection("pairs by file name", kept, [*remarks, *remarks_of(left), *told])


def _all_against_all(chosen: Iterable[Picture], rejected: Iterable[Picture], remarks: list[str]) -> Collection:
    sides = [{picture.content: picture for picture in side} for side in (chosen, rejected)]
    twice = sides[0].keys() & sides[1].keys()
    left = {"left out, both chosen and rejected": sorted(sides[0][one].path for one in twice)}
    kept = [[picture for key, picture in side.items() if key not in twice] for side in sides]
    groups = defaultdict[str, tuple[list[Picture], list[Picture]]](lambda: ([], []))
    for side, pictures in enumerate(kept):
        for picture in pictures:
            groups[normalise_prompt(picture.caption)][side].append(picture)
    how = "file names do not match: each chosen picture is compared with rejected ones"
    compared = {caption: group for caption, group in groups.items() if all(group)}
    if 2 * sum(len(one) for group in compared.values() for one in group) < sum(map(len, kept)):
        how += ", of any caption: most captions are on one side only, so captions are not used"
        return Collection(how, _compared("", *kept), [*remarks, *remarks_of(left)])
    if len(groups) > 1:
        how += " of the same caption"
    left["left out, captions on one side only"] = sorted(
        (group[0] or group[1])[0].caption or "no caption" for group in groups.values() if not all(group)
    )
    pairs = [pair for group in compared.values() for pair in _compared(group[0][0].caption, *group)]
    return Collection(how, pairs, [*remarks, *remarks_of(left)])


def _compared(prompt: str, chosen: Sequence[Picture], rejected: Sequence[Picture]) -> list[RatedPair]:
    """Pair each chosen with each rejected picture, in an order in which all of a side come equally often."""
    number, turn = len(chosen) * len(rejected), lcm(len(chosen), len(rejected))
    # Within a turn no pair recurs; each further turn is shifted by one.
    return [
        RatedPair(prompt, chosen[n % len(chosen)], rejected[(n + n // turn) % len(rejected)], 1.0)
        for n in range(min(number, MOST_COMPARED))
    ]


def without_self(pairs: Sequence[RatedPair]) -> tuple[list[RatedPair], list[str]]:
    """Leave out pairs of a picture with itself, or with a copy; return the others and a remark."""
    own = [" and ".join(pair.names) for pair in pairs if pair.a.content == pair.b.content]
    kept = [pair for pair in pairs if pair.a.content != pair.b.content]
    return kept, remarks_of({"left out, a picture paired with itself": own})


class RatingReader(RowReader):
    """Reader of ratings that leaves rows out, by number and reason; InputError without any left. Opens no picture."""

    def __init__(self, file: Path, columns: Mapping[str, str] | None, labels: Mapping[str, str | float] | None) -> None:
        super().__init__(file.name, "train", randomise_sides=False, on_error="skip")
        self.folder = file.parent
        self.left_out: list[str] = []  # number and reason of each row that was left out
        rows = open_list(file, columns := columns or {}, whole=file.name != RATINGS)
        self.table = PairRowParser(self, columns=columns, labels=labels).table(rows)
        self.report(str(file), "; ".join([f"file: {file} has no rows left", *self.told(), "check it"]))

    def told(self) -> list[str]:
        """Return a line on what was left out, or nothing."""
        return remarks_of({f"{self.source}: rows left out": self.left_out})

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Note the row instead of counting it, since the log would tell the count again."""
        self.left_out.append(f"row {pair_id.rpartition(':')[2]} ({problem})")


def from_ratings(
    file: Path, columns: Mapping[str, str] | None = None, labels: Mapping[str, str | float] | None = None
) -> Collection:
    """Read ratings, a table as :class:`~latentreward.data.JSONLPairReader` takes it."""
    reader = RatingReader(file, columns, labels)
    pictures, unreadable = dict[str, Picture | None](), list[str]()
    pairs, lost, edits = [], 0, 0
    for pair in map(reader.__getitem__, range(len(reader))):
        images = (pair.image_a, pair.image_b)
        for image in images:
            key = image.image_key
            if key in pictures:
                continue
            try:
                decode_image(image)
                pictures[key] = Picture(key, digest([image_bytes(image)]), "")
            except ImageError as error:
                pictures[key] = None
                unreadable.append(f"{key or 'no path'} ({error.problem})")
        first, second = (pictures[image.image_key] for image in images)
        if sources_of(pair.prompt):
            edits += 1
        elif pair.label_a is None or first is None or second is None:
            lost += 1
        elif pair.label_a == 0:
            pairs.append(RatedPair(pair.prompt, second, first, 1.0))
        else:
            pairs.append(RatedPair(pair.prompt, first, second, pair.label_a))
    remarks = [*reader.told(), *remarks_of({"pictures that cannot be read": unreadable})]
    if lost:
        remarks.append(f"left out, pairs without a label or a readable picture: {lost}")
    if edits:
        remarks.append(f"{EDIT}: {edits}")
    kept, told = without_self(pairs)
    return Collection(f"pairs of {file.name}", kept, [*remarks, *told])


def lines(parts: dict[str, list[RatedPair]]) -> str:
    """Return the pairs of all parts as lines for :class:`~latentreward.data.JSONLPairReader`."""
    seen = Counter[str]()
    texts = []
    for split, pairs in parts.items():
        for pair in pairs:
            name = f"{pair.a.content[:12]}-{pair.b.content[:12]}"
            seen[name] += 1
            line: dict[str, object] = {"pair_id": name if seen[name] == 1 else f"{name}-{seen[name]}", "split": split}
            line |= {"prompt": pair.prompt}
            if pair.label == 1:
                line |= {"chosen": pair.a.path, "rejected": pair.b.path}
            else:
                line |= {"image_a": pair.a.path, "image_b": pair.b.path, "label": pair.label}
            line |= {"contents": [pair.a.content, pair.b.content]}
            texts.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(texts)
