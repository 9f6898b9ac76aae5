"""Lines of ``ratings.jsonl``: what is wrong with one, and the reader that leaves such lines out."""

import json
from pathlib import Path
from typing import Any

from latentreward.data.readers.json_rows import short
from latentreward.data.readers.jsonl import JSONLPairReader
from latentreward.errors import InputError
from latentreward.taste.pictures import listed

RATINGS = "ratings.jsonl"


def parse_line(line: bytes) -> dict[str, Any] | str:
    """Parse a line; return its JSON object, or a few words on why it holds none."""
    try:
        text = line.decode("utf-8-sig").strip()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            return "cut off"
        return f"no JSON at character {error.pos + 1}"
    except RecursionError:
        return "nested too deeply"
    except ValueError:  # Python converts 4300 digits at most
        return "a number is too long"
    return value if isinstance(value, dict) else f"{short(value)} is no JSON object"


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
        with (folder / RATINGS).open("rb") as stream:
            parsed = {number: parse_line(line) for number, line in enumerate(stream, start=1)}
        self._flaws = {number: found for number, found in parsed.items() if isinstance(found, str)}
        try:
            super().__init__(str(folder / RATINGS), str(folder), randomise_sides=False, on_error="skip")
        except InputError as error:
            raise InputError("; ".join([str(error), *self.told()])) from error

    def told(self) -> list[str]:
        """Return a line on what was left out, or nothing."""
        return [f"{RATINGS}: lines left out: {listed(self.left_out)}"] if self.left_out else []

    def check_row(self, pair_id: str, row: Any) -> tuple[dict[str, Any], bool]:
        """Check a line as others are, but by its bytes: the text of one that is not UTF-8 was guessed."""
        if flaw := self._flaws.get(int(pair_id.rpartition(":")[2])):
            self.refuse(pair_id, flaw, flaw)
            return {}, False
        return super().check_row(pair_id, row)

    def refuse(self, pair_id: str, problem: str, reason: str, rows: int = 1) -> None:
        """Note the line instead of counting it, since the log would tell the count again."""
        self.left_out.append(f"line {pair_id.rpartition(':')[2]} ({problem})")
