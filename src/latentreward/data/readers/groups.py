"""Prompts with several ranked images, of which every pair is a row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.data.readers.base import PairReader
from latentreward.data.readers.json_rows import check_row, parse_number, parse_text, short
from latentreward.data.readers.rows import RowReader

UNRANKED = float("nan")


@dataclass(frozen=True)
class ImageGroup:
    """Ranked images of one prompt, in the order of the file."""

    name: str  # stable name of the group; the ``pair_id`` of each of its pairs begins with this name
    prompt: str  # raw text
    images: Sequence[str | None]  # path or name by which the reader finds each image; None where the file gives none
    ranks: Sequence[float]  # one number per image, the lowest is best; NaN leaves the image's pairs unlabelled
    group_id: str | None = None  # name of the group in the data set; None if the data set gives none


def pair_images(groups: Iterable[ImageGroup], named_by_group: bool = False) -> pa.Table:
    """Make a table for ``RowReader``, with a row of each pair of images (positions i < j) of each group.

    A group of n images gives n (n − 1) / 2 rows. The image with the lower rank is preferred; equal ranks are a tie
    (label ½). Of groups of two, the group's name may be that of the pair (``named_by_group``), without positions. The
    table also has ``image_a``, ``image_b``, and ``number_a``, ``number_b``: the numbers of the images, counted over all
    groups. Texts that rows share are stored once.
    """
    names, prompts, ids, sizes = [], [], [], []
    images: list[str | None] = []
    ranks: list[float] = []
    for group in groups:
        names.append(group.name)
        prompts.append(group.prompt)
        ids.append(group.group_id)
        images.extend(group.images)
        ranks.extend(group.ranks)
        sizes.append(len(group.images))
    columns: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 3]  # group and both positions of all pairs
    for size in np.unique(np.array(sizes, np.int64)):
        alike = np.flatnonzero(np.array(sizes) == size)
        first, second = np.triu_indices(int(size), 1)
        columns.append((np.repeat(alike, len(first)), np.tile(first, len(alike)), np.tile(second, len(alike))))
    number, a, b = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(number, kind="stable")
    number, a, b = number[order], a[order], b[order]
    starts = np.cumsum([0, *sizes])[number]
    places = zip(number.tolist(), a.tolist(), b.tolist(), strict=True)
    pair_ids = [names[group] if named_by_group else f"{names[group]}:{i}-{j}" for group, i, j in places]

    rank_a, rank_b = (np.array(ranks, dtype=np.float64)[starts + place] for place in (a, b))
    labels = np.where(rank_a < rank_b, 1.0, np.where(rank_a > rank_b, 0.0, 0.5))
    labels = np.where(np.isnan(rank_a) | np.isnan(rank_b), np.nan, labels)

    def shared(numbers: np.ndarray, texts: Sequence[str | None]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int64()), pa.array(texts, pa.large_string()))

    return pa.table(
        {
            "pair_id": pa.array(pair_ids, pa.large_string()),
            "prompt": shared(number, prompts),
            "group": shared(number, names),
            "group_id": shared(number, ids),
            "label": pa.array(labels, from_pandas=True),
            "image_a": shared(starts + a, images),
            "image_b": shared(starts + b, images),
            "number_a": starts + a,
            "number_b": starts + b,
        }
    )


def parse_ranked(
    reader: RowReader, name: str, row: Any, fields: tuple[str, str], count: int | None = None
) -> ImageGroup | None:
    """Check a row of a JSON file and make a group of ranked images from it; None if ``on_error`` leaves it out.

    The row has the list of paths, ``count`` if given, relative to the reader's folder, and that of ranks in its two
    ``fields``. A path that is not text is replaced by None.

    Raises:
        InputError: If ``on_error`` is ``"raise"`` and the row breaks a rule, or a path is missing or leads out.
    """
    row, sound = check_row(reader, name, row)
    paths, ranks = row.get(fields[0]), None
    listed = isinstance(paths, list) and count in (None, len(paths))
    if sound and listed:
        ranks = check_ranks(reader, name, fields[1], row.get(fields[1]), len(paths))
    elif sound:
        wanted = "a list of paths" if count is None else f"{count} paths"
        reader.refuse(name, f"{fields[0]} is {short(paths)}, not {wanted}", f"{fields[0]} not readable")
    if ranks is None and reader.on_error == "skip":
        return None
    images = paths if listed else [None] * (count or 0)
    for path in images if listed else ():
        reader.check_path(name, fields[0], path)
    prompt = parse_text(row.get("prompt")) or ""
    return ImageGroup(name, prompt, [*map(parse_text, images)], ranks or [UNRANKED] * len(images), name)


def check_ranks(reader: PairReader, name: str, field: str, value: Any, count: int) -> list[float] | None:
    """Return the ranks of ``count`` images; ``UNRANKED`` (NaN) for all if the value or all ranks are null.

    None if the value is not one number for each image, after applying ``on_error``.
    """
    if value is None or (value and value == [None] * count):
        reader.remarks[f"unlabelled (no {field})"] += 1
        return [UNRANKED] * count
    ranks = [parse_number(item) for item in value] if isinstance(value, list) else []
    numbers = [rank for rank in ranks if rank is not None]
    if isinstance(value, list) and len(numbers) == len(ranks) == count:
        return numbers
    problem = f"{field} is {short(value)}, not one number for each of {count} images"
    reader.refuse(name, problem, f"{field} not readable")
    return None
