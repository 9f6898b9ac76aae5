"""Base of readers of prompts with several ranked images; every pair of a prompt's images is a row."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.contracts import ImageRef, PreferencePair
from latentreward.data.readers.base import exchange_sides
from latentreward.data.readers.json_rows import JSONReader, parse_number, parse_text, relative_path, short

UNRANKED = float("nan")


@dataclass(frozen=True)
class ImageGroup:
    """Ranked images of one prompt, in the order of the file.

    Attributes:
        name: Stable name of the group; the ``pair_id`` of each of its pairs begins with this name.
        prompt: Raw text.
        images: Path or name by which the reader finds each image; None where the file gives none.
        ranks: One number per image, the lowest for the best image; NaN leaves the image's pairs unlabelled.
        group_id: Name of the group in the data set; None if the data set gives none.
    """

    name: str
    prompt: str
    images: Sequence[str | None]
    ranks: Sequence[float]
    group_id: str | None = None


class GroupIndex:
    """Compact arrays of all pairs of images (positions i < j) in all groups, group by group.

    Args:
        groups: Groups; one of n images gives n (n − 1) / 2 pairs.
    """

    def __init__(self, groups: Iterable[ImageGroup]) -> None:
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
        self.names, self.group_ids = pa.array(names, pa.large_string()), pa.array(ids, pa.large_string())
        self.prompts, self.images = pa.array(prompts, pa.large_string()), pa.array(images, pa.large_string())
        self.starts = np.cumsum([0, *sizes])
        self.group, self.a, self.b = _all_pairs(np.array(sizes, dtype=np.int64))
        self.labels = _compare(np.array(ranks, dtype=np.float64), self.starts[self.group], self.a, self.b)

    def places(self) -> list[tuple[int, int, int]]:
        """Return (group number, position of image a, position of image b) of every pair."""
        return list(zip(self.group.tolist(), self.a.tolist(), self.b.tolist(), strict=True))

    def image(self, group: int, position: int) -> str | None:
        """Return the path or name of the image at ``position`` of a group, see :class:`ImageGroup`."""
        return self.images[int(self.starts[group]) + position].as_py()


class GroupReader(JSONReader):
    """Base of readers of pairs of images of one prompt, labelled by comparing the images' ranks.

    Equal ranks are a tie (label ½) and are kept. A subclass calls :meth:`fill` and implements :meth:`find_image`. A
    group that breaks a rule falls under ``on_error`` as a whole and counts once; as a placeholder its pairs are kept
    without labels.

    Args:
        source: Name of the data set.
        split: Name of the split.
        options: See :class:`~latentreward.data.readers.base.SideExchangingReader`.

    Attributes:
        num_groups: Number of groups kept.
        num_images: Number of images in the kept groups.
    """

    def __init__(self, source: str, split: str, **options: Any) -> None:
        super().__init__(**options)
        self.source, self.split = source, split

    def fill(self, groups: Iterable[ImageGroup]) -> None:
        """Build the index of pairs from the groups; to be called once, in the subclass's constructor."""
        self._index = GroupIndex(groups)
        self.num_groups, self.num_images = len(self._index.names), len(self._index.images)

    def __len__(self) -> int:
        return len(self._index.labels)

    def __getitem__(self, index: int) -> PreferencePair:
        group, a, b = (int(column[index]) for column in (self._index.group, self._index.a, self._index.b))
        label = float(self._index.labels[index])
        pair = PreferencePair(
            pair_id=self.name_pair(self._index.names[group].as_py(), a, b),
            prompt=self._index.prompts[group].as_py(),
            image_a=self.find_image(group, a),
            image_b=self.find_image(group, b),
            label_a=None if np.isnan(label) else label,
            group_id=self._index.group_ids[group].as_py(),
            votes=self.count_votes(group, a, b),
            model_a=self.find_model(a),
            model_b=self.find_model(b),
            source=self.source,
            split=self.split,
        )
        return pair.swapped() if self.is_exchanged(pair.pair_id) else pair

    def labels(self) -> np.ndarray:
        """Return ``label_a`` of every row, ``(len,)`` float64, NaN for unlabelled rows."""
        return np.where(self.exchanged(), 1 - self._index.labels, self._index.labels)

    def labelled(self) -> np.ndarray:
        """Return whether both images of each row have a rank, ``(len,)`` bool."""
        return ~np.isnan(self._index.labels)

    def prompts(self) -> list[str]:
        """Return the raw prompt of every row."""
        prompts = self._index.prompts.to_pylist()
        return [prompts[group] for group in self._index.group]

    def pair_ids(self) -> list[str]:
        """Return the ``pair_id`` of every row, see :meth:`name_pair`."""
        names = self._index.names.to_pylist()
        return [self.name_pair(names[group], a, b) for group, a, b in self._index.places()]

    def groups(self) -> list[str]:
        """Return the name of every row's group, see :class:`ImageGroup`."""
        names = self._index.names.to_pylist()
        return [names[group] for group in self._index.group]

    def facts(self) -> dict[str, list[Any]]:
        """Return ``model_a``, ``model_b``, ``votes_a`` and ``votes_b``, each a list with one value per row.

        A value is None where the data set does not publish it.
        """
        places = self._index.places()
        votes = [self.count_votes(*place) or (None, None) for place in places]
        facts: dict[str, list[Any]] = {
            "model_a": [self.find_model(a) for _, a, _ in places],
            "model_b": [self.find_model(b) for _, _, b in places],
            "votes_a": [first for first, _ in votes],
            "votes_b": [second for _, second in votes],
        }
        return exchange_sides(facts, self.exchanged())

    @abstractmethod
    def find_image(self, group: int, position: int) -> ImageRef:
        """Return a reference to the image at ``position`` of group number ``group``."""

    def name_pair(self, name: str, a: int, b: int) -> str:
        """Return the ``pair_id`` of the images at positions ``a`` and ``b`` of the group ``name``."""
        return f"{name}:{a}-{b}"

    def count_votes(self, group: int, a: int, b: int) -> tuple[int, int] | None:
        """Return the votes for the images at positions ``a`` and ``b``; None if not published."""
        return None

    def find_model(self, position: int) -> str | None:
        """Return the name of the model that generated the images at ``position``; None if not published."""
        return None

    def parse_ranked(self, name: str, row: Any, fields: tuple[str, str], folder: Path) -> ImageGroup | None:
        """Check a row of a JSON file and make a group of ranked images from it.

        The row has the list of paths, relative to ``folder``, and that of ranks in its two ``fields``.

        Returns:
            The group; None if ``on_error`` leaves it out.
        """
        row, sound = self.check_row(name, row)
        paths = row.get(fields[0])
        if not sound:
            ranks = None
        elif isinstance(paths, list):
            ranks = self.check_ranks(name, fields[1], row.get(fields[1]), len(paths))
        else:
            ranks = None
            self.refuse(name, f"{fields[0]} is {short(paths)}, not a list of paths", f"{fields[0]} not readable")
        if ranks is None and self.on_error == "skip":
            return None
        images = self.check_paths(name, fields[0], paths if isinstance(paths, list) else [], folder)
        return ImageGroup(name, parse_text(row.get("prompt")) or "", images, ranks or [UNRANKED] * len(images), name)

    def check_paths(self, name: str, field: str, paths: list[Any], folder: Path) -> list[str | None]:
        """Check the paths of a group's images and return them; None replaces a path that is not text.

        Raises:
            InputError: If ``on_error`` is ``"raise"`` and a path is missing or leads out of ``folder``.
        """
        for path in paths:
            self.check_path(name, field, path, folder)
        return [parse_text(path) for path in paths]

    def check_ranks(self, name: str, field: str, value: Any, count: int) -> list[float] | None:
        """Check the ranks of ``count`` images and return them.

        Returns:
            ``UNRANKED`` (NaN) for all images if the value or all ranks are null. None if the value is not one number
            for each image, after applying ``on_error``.
        """
        if value is None or (value and value == [None] * count):
            self.remarks[f"unlabelled (no {field})"] += 1
            return [UNRANKED] * count
        ranks = [parse_number(item) for item in value] if isinstance(value, list) else []
        numbers = [rank for rank in ranks if rank is not None]
        if isinstance(value, list) and len(numbers) == len(ranks) == count:
            return numbers
        problem = f"{field} is {short(value)}, not one number for each of {count} images"
        self.refuse(name, problem, f"{field} not readable")
        return None


def file_image(folder: Path, path: str | None, prefix: str = "") -> ImageRef:
    """Return a reference to an image file inside ``folder``, whose ``image_key`` begins with ``prefix``."""
    if not path:
        return ImageRef("")
    path = relative_path(path, folder)
    return ImageRef(prefix + str(PurePosixPath(path)), path=folder / path, root=folder)


def _all_pairs(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return group numbers and both positions of all pairs, each ``(pairs,)``, ordered by group, then by position."""
    columns: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 3]
    for size in np.unique(sizes):
        groups = np.flatnonzero(sizes == size)
        a, b = np.triu_indices(int(size), 1)
        columns.append((np.repeat(groups, len(a)), np.tile(a, len(groups)), np.tile(b, len(groups))))
    group, a, b = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(group, kind="stable")
    return group[order].astype(np.int32), a[order].astype(np.int32), b[order].astype(np.int32)


def _compare(ranks: np.ndarray, starts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the label of the first image of each pair: 1, ½ or 0, or NaN where a rank is NaN."""
    rank_a, rank_b = ranks[starts + a], ranks[starts + b]
    labels = np.where(rank_a < rank_b, 1.0, np.where(rank_a > rank_b, 0.0, 0.5))
    return np.where(np.isnan(rank_a) | np.isnan(rank_b), np.nan, labels)
