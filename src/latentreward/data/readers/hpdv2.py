"""HPDv2: compared pairs for training and ranked groups for testing, image files named in JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.contracts import ImageRef
from latentreward.data.readers.groups import UNRANKED, GroupReader, ImageGroup, file_image
from latentreward.data.readers.hub import fetch_files, is_hub_id
from latentreward.data.readers.json_rows import load_rows, parse_number, parse_text, short
from latentreward.errors import InputError

CHOICES = {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}


class HPDv2Reader(GroupReader):
    """Pairs of one split of HPDv2, with sides in the order of the file, which does not tell the winner.

    ``train.json`` holds pairs with a choice each, ``test.json`` groups with a rank for each image; a group of n
    images gives its n (n − 1) / 2 pairs, in the order of its images, all with its ``group_id``. Equal ranks, and the
    choice (½, ½), are ties and kept. A choice is unlabelled if it is null or missing, or if it is neither for one
    image nor a tie, as in (1, 1). The annotators' own rankings, where given, become the votes of a pair, without
    those who rank its images equally; the label follows the published rank also against their majority.

    A null or missing prompt is read as an empty one. A path that is none or leads out of the folder of images is
    found at once, an absent file when it is decoded. A row that is no object, a prompt that is no text, paths that
    are no list (of two in training), and choices or ranks that are no numbers fall under ``on_error``, groups as a
    whole. Duplicate rows and pairs of unequal sizes are kept.

    Constructing a reader parses the whole JSON file and keeps it in a compact form.

    Args:
        root: Folder with ``{split}.json`` and, in ``{split}/``, the images of the unpacked ``{split}.tar.gz``; no
            image outside that is opened. Otherwise the id of a data set on the hub with those files.
        split: ``train`` or ``test``.
        images: Folder of the images, if it is another, e.g. for a split of your own cut out of ``train.json``.
        revision: Commit, tag or branch of the hub data set; pin it.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`.

    Raises:
        InputError: If the file is absent, is no JSON list, has no pairs left, or breaks a rule above.
    """

    exif = "ignore"

    def __init__(
        self,
        root: str,
        split: str,
        *,
        images: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__("hpdv2", split, randomise_sides=False, seed=0, **options)
        file, folder = _locate(root, split, revision)
        self._folder = Path(images) if images else folder
        self._name, self._prefix = f"{split}.json", f"{Path(images).name if images else split}/"
        self._rankings: list[np.ndarray | None] = []
        rows = load_rows(file)
        self._ranked = any(isinstance(row, dict) and "image_path" in row for row in rows)
        self.fill(self._parse_groups(rows) if self._ranked else self._parse_pairs(rows))
        if not len(self):
            raise InputError(f"split: {file} has no pairs left; give the published file")
        self.report(str(file))

    def find_image(self, group: int, position: int) -> ImageRef:
        """A reference to a file."""
        return file_image(self._folder, self._index.image(group, position), self._prefix)

    def name_pair(self, name: str, a: int, b: int) -> str:
        """File and row, with the positions of the images in a group."""
        return super().name_pair(name, a, b) if self._ranked else name

    def count_votes(self, group: int, a: int, b: int) -> tuple[int, int] | None:
        """How many annotators rank each of two images above the other."""
        rankings = self._rankings[group] if self._ranked else None
        if rankings is None:
            return None
        return int((rankings[:, a] < rankings[:, b]).sum()), int((rankings[:, a] > rankings[:, b]).sum())

    def _parse_pairs(self, rows: list[Any]) -> Iterator[ImageGroup]:
        for number, content in enumerate(rows):
            name = f"{self._name}:{number}"
            row, sound = self.check_row(name, content)
            paths = row.get("file_path")
            paired = isinstance(paths, list) and len(paths) == 2
            if sound and not paired:
                self.refuse(name, f"file_path is {short(paths)}, not two paths", "file_path not readable")
            ranks = self._parse_choice(name, row.get("human_preference")) if sound and paired else None
            if ranks is None and self.on_error == "skip":
                continue
            images = self.check_paths(name, "file_path", paths, self._folder) if paired else [None, None]
            yield ImageGroup(name, parse_text(row.get("prompt")) or "", images, ranks or [UNRANKED] * 2)

    def _parse_choice(self, name: str, value: Any) -> list[float] | None:
        """Ranks of two images from the choice between them; None if it is refused."""
        choice = self.check_ranks(name, "human_preference", value, 2)
        if choice is None or np.isnan(choice).any():
            return choice
        if tuple(choice) not in CHOICES:
            self.remarks["unlabelled (human_preference is neither a choice nor a tie)"] += 1
            return [UNRANKED] * 2
        return [-share for share in choice]

    def _parse_groups(self, rows: list[Any]) -> Iterator[ImageGroup]:
        for number, row in enumerate(rows):
            group = self.parse_ranked(f"{self._name}:{number}", row, ("image_path", "rank"), self._folder)
            if group is not None:
                annotations = row.get("raw_annotations") if isinstance(row, dict) else None
                self._rankings.append(self._parse_rankings(annotations, len(group.images)))
                yield group

    def _parse_rankings(self, value: Any, count: int) -> np.ndarray | None:
        """``(annotators, count)`` ranks; None where there are none."""
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        rankings = [item.get("rank") if isinstance(item, dict) else None for item in items]
        sound = [ranks for ranks in rankings if isinstance(ranks, list) and len(ranks) == count]
        numbers = [ranks for ranks in ([parse_number(rank) for rank in ranks] for ranks in sound) if None not in ranks]
        if len(numbers) < len(rankings):
            self.remarks["raw_annotations not readable"] += 1
        return np.array(numbers, dtype=np.float64) if numbers else None


def _locate(root: str, split: str, revision: str | None) -> tuple[Path, Path]:
    """The JSON file and the folder of images of a split; an archive of the hub is unpacked in the download cache."""
    if Path(root).is_dir() or not is_hub_id(root):
        return Path(root, f"{split}.json"), Path(root, split)
    (file,) = fetch_files(root, [f"{split}.json"], revision)
    (folder,) = fetch_files(root, [f"{split}.tar.gz"], revision, extract=True)
    return file, folder / split if (folder / split).is_dir() else folder
