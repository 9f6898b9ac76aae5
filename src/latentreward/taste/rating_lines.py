"""Reader of ``ratings.jsonl``, which leaves out lines that cannot be used."""

from pathlib import Path

from latentreward.data.readers.jsonl import JSONLPairReader
from latentreward.errors import InputError
from latentreward.taste.pictures import listed

RATINGS = "ratings.jsonl"


class RatingReader(JSONLPairReader):
    """Reader of ``ratings.jsonl`` that leaves lines out by number and reason; pictures are found out later.

    Args:
        folder: Folder of the file and of the pictures.

    Attributes:
        left_out: Number and reason of each line that was left out.

    Raises:
        InputError: If no line is left.
    """

    def __init__(self, folder: Path) -> None:
        self.left_out: list[str] = []
        try:
            super().__init__(str(folder / RATINGS), str(folder), randomise_sides=False, on_error="skip")
        except InputError as error:
            raise InputError("; ".join([str(error), *self.told()])) from error

    def told(self) -> list[str]:
        """Return a line on what was left out, or nothing."""
        return [f"{RATINGS}: lines left out: {listed(self.left_out)}"] if self.left_out else []

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Note the line instead of counting it, since the log would tell the count again."""
        self.left_out.append(f"line {pair_id.rpartition(':')[2]} ({problem})")
