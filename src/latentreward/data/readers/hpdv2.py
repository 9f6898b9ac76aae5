"""Reader of HPDv2: JSON files with compared pairs for training and ranked groups of images for testing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import PathText
from latentreward.core.storage.hub import is_hub_id
from latentreward.data.readers.groups import UNRANKED, ImageGroup, pair_images, parse_ranked
from latentreward.data.readers.hub import fetch_files
from latentreward.data.readers.json_rows import load_rows, parse_number
from latentreward.data.readers.rows import RowReader


class HPDv2Reader(RowReader):
    """Reader of one split of HPDv2; images a and b keep the order of the file, which does not reveal the winner.

    ``train.json`` holds pairs, each with a choice such as (1, 0). ``test.json`` holds groups of images with a rank for
    each image. A group of n images gives n (n − 1) / 2 pairs, in the order of its images and with one ``group_id``.
    Equal ranks and the choice (½, ½) are ties and are kept. A pair is unlabelled if its choice is null or missing, or
    is neither a preference nor a tie, e.g. (1, 1). If the file gives the annotators' own rankings, they become the
    votes of a pair; annotators who rank both images equally are not counted. The label follows the published rank,
    even where the majority of votes contradicts it.

    A null or missing prompt is read as an empty prompt. A row falls under ``on_error`` if it is not an object, its
    prompt is not text or too long, its paths are not a list (of two paths in training), or its choice or ranks are not
    numbers; a group falls under ``on_error`` as a whole. Duplicate rows, and images of unlike sizes, are kept.

    The constructor parses the whole JSON file and keeps it in a compact form.

    Args:
        root: Folder with ``{split}.json`` and, in ``{split}/``, the images of the unpacked ``{split}.tar.gz``; images
            outside ``{split}/`` are not opened. Otherwise the id of a hub data set with those files.
        split: ``train`` or ``test``.
        images: Folder of the images if it is not ``{split}/``, e.g. for a split of your own made from ``train.json``.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`.

    Raises:
        InputError: If the file is missing, is not a JSON list, has no pairs left, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self, root: PathText, split: str, *, images: PathText | None = None, revision: str | None = None, **options: Any
    ) -> None:
        super().__init__("hpdv2", split, randomise_sides=False, seed=0, **options)
        if Path(root).is_dir() or not is_hub_id(root):
            file, folder = Path(root, f"{split}.json"), Path(root, split)
            self.check_inside(root, file, folder)
        else:
            (file,) = fetch_files(root, [f"{split}.json"], revision)
            (folder,) = fetch_files(root, [f"{split}.tar.gz"], revision, extract=True)
            folder = folder / split if (folder / split).is_dir() else folder
        self.folder = Path(images) if images else folder
        self._name, self.prefix = f"{split}.json", f"{Path(images).name if images else split}/"
        rows = load_rows(file)
        ranked = any(isinstance(row, dict) and "image_path" in row for row in rows)
        votes: list[tuple[int, int] | tuple[None, None]] = []
        self.table = pair_images(self._parse(rows, ranked, votes), named_by_group=not ranked)
        for name, counts in zip(("votes_a", "votes_b"), zip(*votes, strict=True), strict=False):
            self.table = self.table.append_column(name, pa.array(counts, pa.int64()))
        self.report(str(file), f"split: {file} has no pairs left; give the published file")

    def _parse(
        self, rows: list[Any], ranked: bool, votes: list[tuple[int, int] | tuple[None, None]]
    ) -> Iterator[ImageGroup]:
        """Yield the compared pairs or ``ranked`` groups, and add the votes on each pair of a group to ``votes``."""
        fields, count = (("image_path", "rank"), None) if ranked else (("file_path", "human_preference"), 2)
        for number, row in enumerate(rows):
            group = parse_ranked(self, f"{self._name}:{number}", row, fields, count)
            if group is not None and ranked:
                annotations = row.get("raw_annotations") if isinstance(row, dict) else None
                votes += self._count_votes(annotations, len(group.images))
                yield group
            elif group is not None:
                ranks = [-share for share in group.ranks]
                if not np.isnan(ranks).any() and tuple(group.ranks) not in {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}:
                    self.remarks["unlabelled (human_preference is neither a choice nor a tie)"] += 1
                    ranks = [UNRANKED] * 2
                yield replace(group, ranks=ranks, group_id=None)

    def _count_votes(self, value: Any, count: int) -> list[tuple[int, int]] | list[tuple[None, None]]:
        """Count the annotators who rank image a above b, and b above a, for each pair of ``count`` images.

        Both counts are None if there are no rankings that can be read.
        """
        items = value if isinstance(value, list) else [] if value is None else [value]
        rankings = [item.get("rank") if isinstance(item, dict) else None for item in items]
        sound = [ranks for ranks in rankings if isinstance(ranks, list) and len(ranks) == count]
        numbers = [ranks for ranks in ([parse_number(rank) for rank in ranks] for ranks in sound) if None not in ranks]
        if len(numbers) < len(rankings):
            self.remarks["raw_annotations not readable"] += 1
        first, second = np.triu_indices(count, 1)
        if not numbers:
            return [(None, None)] * len(first)
        ranks = np.array(numbers, dtype=np.float64)
        above, below = ranks[:, first] < ranks[:, second], ranks[:, first] > ranks[:, second]
        return list(zip(above.sum(axis=0).tolist(), below.sum(axis=0).tolist(), strict=True))
