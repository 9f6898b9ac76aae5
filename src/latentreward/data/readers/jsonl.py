"""Reader of JSON lines: pairs of image files of your own, one object per line."""

from pathlib import Path
from typing import Any

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError
from latentreward.data.readers.folders import read_lines
from latentreward.data.readers.json_rows import parse_line
from latentreward.data.readers.pair_rows import PairRowParser
from latentreward.data.readers.rows import RowReader


class JSONLPairReader(RowReader):
    """Reader of pairs of image files from a file of JSON lines.

    A line has a ``prompt`` and either ``chosen`` and ``rejected``, or ``image_a``, ``image_b`` and ``label``::

        {"prompt": "a cat", "chosen": "images/1.jpg", "rejected": "images/2.jpg"}
        {"prompt": "a cat", "image_a": "images/1.jpg", "image_b": "images/2.jpg", "label": 0.5}

    ``label`` is the probability in [0, 1] that a is preferred (½ for a tie), or ``"a"``, ``"b"`` or ``"tie"``. A line
    with a null or missing label is unlabelled, also if it has ``votes``; other keys are not read. Optional fields are
    ``votes`` ([a, b] or [chosen, rejected]), ``confidence`` in [0, 1], ``weight`` (of the pair in the loss, 0 or more),
    ``pair_id`` (default ``FILE:LINE``), ``group_id``, ``split`` (by which a cache tells the splits of one file apart),
    and of the first and the second image ``model_a`` and ``model_b``, the names of their generators, and ``noise_a``
    and ``noise_b``, the column ``noise`` of the table of ``latentreward generate``. If the images
    are edits of pictures, ``source_images`` lists these in their order (or ``source_image`` names the only one), and
    ``prompt`` is the instruction.

    Paths are relative to ``root``. A null or missing prompt is read as an empty prompt. Unreadable ``votes`` and
    ``confidence`` are ignored. Blank lines are ignored. A line falls under ``on_error`` if it is not an object, if its
    prompt is not text or too long, if its label or weight is out of range, if an image has more than a billion votes,
    if it has more than 16 pictures to edit or one in another field, or if its ``pair_id`` occurred before.

    Args:
        file: Path of the file. Keys of a line: ``prompt``; ``chosen`` and ``rejected`` (paths), or ``image_a``,
            ``image_b`` (paths) and ``label`` (probability that a is preferred, or ``a``, ``b``, ``tie``); optionally
            ``votes``, ``confidence``, ``weight``, ``pair_id``, ``group_id``, ``split``, ``model_a``, ``model_b``,
            ``noise_a``, ``noise_b``, ``source_images`` (list of paths) or ``source_image``.
        root: Folder that paths are relative to and that all images must lie in; by default the file's folder.
        split: Name of the split of lines without their own.
        options: See :class:`~latentreward.data.readers.rows.RowReader`. In lines with ``chosen`` and
            ``rejected``, the chosen image is a or b at random; lines with ``image_a`` and ``image_b`` stay as written.

    Raises:
        InputError: If the file is missing, no line is left, or a line breaks a rule above under ``on_error: raise``.
    """

    def __init__(self, file: PathText, root: PathText | None = None, split: str = "train", **options: Any) -> None:
        super().__init__(Path(file).name, split, **options)
        check_no_csv("file", file)
        self.folder = Path(root) if root else Path(file).parent
        rows = PairRowParser(self, self.check_path)
        lines = ((f"{self.source}:{number}", number, parse_line(line)) for number, line in read_lines(Path(file)))
        self.table = rows.table(lines)
        self.report(str(file), f"file: {file} has no lines left; give one JSON object per line")


def check_no_csv(field: str, file: str) -> None:
    """Raise InputError for a table in CSV or TSV, which no reader of pairs takes, with the way to convert it."""
    if (suffix := Path(file).suffix.lower()) in (".csv", ".tsv"):
        table = f"pandas.read_csv({file!r}{', sep=chr(9)' if suffix == '.tsv' else ''})"
        lines = f"{table}.to_json({str(Path(file).with_suffix('.jsonl'))!r}, orient='records', lines=True)"
        raise InputError(f"{field}: {file} is CSV, which no reader of pairs takes; write JSON lines: {lines}")
