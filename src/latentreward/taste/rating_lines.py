"""Reader of ``ratings.jsonl``, which leaves out lines that cannot be used."""

from pathlib import Path

from latentreward.data.readers.folders import read_lines
from latentreward.data.readers.json_rows import parse_line
from latentreward.data.readers.pair_rows import PairRowParser
from latentreward.data.readers.rows import RowReader
from latentreward.taste.pictures import listed

RATINGS = "ratings.jsonl"


class RatingReader(RowReader):
    """Reader of ``ratings.jsonl`` that leaves lines out by number and reason; pictures are found out later.

    Args:
        folder: Folder of the file and of the pictures.

    Attributes:
        left_out: Number and reason of each line that was left out.

    Raises:
        InputError: If no line is left.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(RATINGS, "train", randomise_sides=False, on_error="skip")
        self.folder, self.left_out = folder, list[str]()
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
