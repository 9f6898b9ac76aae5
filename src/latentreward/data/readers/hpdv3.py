"""Reader of HPDv3 and HPDv3++: JSON files with pairs of image files, the preferred one first, and votes on them."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import PathText
from latentreward.data.readers.json_rows import load_rows, parse_json, short
from latentreward.data.readers.pair_rows import PairRowParser
from latentreward.data.readers.rows import RowReader

COLUMNS = {
    "prompt": "prompt",
    "chosen": "path1",
    "rejected": "path2",
    "model_a": "model1",
    "model_b": "model2",
    "votes": "choice_dist",
    "confidence": "confidence",
    "source_images": "source_images",
}


class HPDv3Reader(RowReader):
    """Reader of one JSON file of HPDv3, or of the pairs of HPDv3++.

    ``path1`` is the preferred image, as published, even where the majority of votes contradicts it: the authors
    weighted annotators by ability. A null or missing prompt is read as an empty prompt. Unreadable votes and
    confidences are read as not published. A row falls under ``on_error`` if it is not a JSON object, its prompt is not
    text or too long, or an image has more than a billion votes. Duplicate rows are kept.

    HPDv3++ (``Junjun2333/HPDv3-PlusPlus``) has the same rows, with votes and confidence as texts or null, in subfolders
    of ``root``: ``train/train_aes``, ``train/train_tf``, ``test/test_aes`` and ``test/test_tf`` compare aesthetics or
    text following. Its ``rollout.json`` holds single images without labels and is not read.

    The constructor parses the whole JSON file and keeps it in a compact form.

    Args:
        root: Folder with the JSON files and ``images/``; images outside it are not opened.
        split: Name of the JSON file without suffix: ``all``, ``train`` or ``test``; of HPDv3++ with its subfolder.
        min_confidence: Leave out rows with a lower confidence than this, e.g. 0.95; rows without confidence are kept.
        label: ``"hard"`` labels the image of ``path1`` with 1. ``"votes"`` uses its fraction of the votes as the label,
            and 1 for a row without votes.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.

    Raises:
        InputError: If the file is missing, is not a JSON list, has no rows left, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        root: PathText,
        split: str,
        *,
        min_confidence: float | None = None,
        label: Literal["hard", "votes"] = "hard",
        **options: Any,
    ) -> None:
        super().__init__("hpdv3", split, **options)
        self.folder = Path(root)
        file = self.folder / f"{split}.json"
        self.check_inside(root, file)
        rows = PairRowParser(self, self.check_path, COLUMNS)
        numbered = enumerate(load_rows(file))
        table = rows.table((f"{file.name}:{number}", number, _plain(row)) for number, row in numbered)
        if min_confidence is not None:
            sure = pc.greater_equal(table.column("confidence"), min_confidence).fill_null(True)
            table = table.filter(sure)
            if unsure := len(sure) - len(table):
                self.skipped["confidence below the threshold"] += unsure
        if label == "votes":
            first, total = table.column("votes_a"), pc.add(table.column("votes_a"), table.column("votes_b"))
            counted = pc.and_kleene(table.column("label").is_valid(), pc.greater(total, 0).fill_null(False))
            shares = pc.divide(first.cast(pa.float64()), pc.if_else(counted, total, 1).cast(pa.float64()))
            labels = pc.if_else(counted, shares, table.column("label"))
            table = table.set_column(table.column_names.index("label"), "label", labels)
        self.table = table
        self.report(str(file), f"split: {file} has no rows left; check the file and min_confidence")


def _plain(row: Any) -> Any:
    """Return a row with the texts of votes and confidence of HPDv3++ as plain values, or a text on why it is none."""
    if not isinstance(row, dict):
        return f"the row is {short(row)}, not an object"
    texts = {name: row[name] for name in ("choice_dist", "confidence") if isinstance(row.get(name), str)}
    nulls = ("", "null", "none", "nan")
    plain = {name: None if text.strip().lower() in nulls else text for name, text in texts.items()}
    if isinstance(votes := plain.get("choice_dist"), str):
        plain["choice_dist"] = parse_json(votes, votes)
    return row | plain
