"""Check and identity of the images of ``latentreward score``, and reading and summary of the table that it wrote."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.digests import digest, size_and_time
from latentreward.data import count_text
from latentreward.data.image_lists import ImageList, ListedImage
from latentreward.data.images import MISSING
from latentreward.data.readers.json_rows import short
from latentreward.data.score_table import load_table

TEXTS, SIDES = ("image", "prompt", "problem"), ("width", "height")
NAMED = 5  # largest number of images without a score, and of remarks, that a summary lists


def require_some(listed: ImageList) -> None:
    """Raise InputError, before a model is loaded, if every image of the list has a problem or lacks its file."""
    if all(row.problem or not Path(row.path).is_file() for row in listed.rows):
        reasons = Counter(row.problem or MISSING for row in listed.rows)
        first = next(row.detail or row.path for row in listed.rows)
        text = f"{count_text(reasons)} ({first})"
        raise InputError(f"images: none of {len(listed.rows)} in {listed.source} can be scored: {text}")


def images_identity(listed: ImageList, with_files: bool = True) -> str:
    """Return a text with a hash of names and prompts, and, unless left out, of file sizes and modification times.

    ``latentreward score`` compares it with that of an interrupted run, which continues only with the same inputs.
    Without the files it is equal for copies on several machines.
    """

    def facts(row: ListedImage) -> str:
        sources = sources_of(row.prompt)
        files = [row.path, *(source.path for source in sources if source.path)] if with_files else []
        keys = (source.image_key for source in sources)
        return repr((row.name, row.prompt, row.problem, *keys, *(size_and_time(Path(file)) for file in files)))

    return f"{len(listed.rows)} images, {digest(map(facts, listed.rows))}"


def read_scores(path: Path) -> pa.Table:
    """Read a ``.csv``, ``.jsonl`` or ``.parquet`` file of scores.

    Columns in :data:`TEXTS` are strings, columns in :data:`SIDES` are int32, all others are float32.

    Raises:
        InputError: If the file is damaged, or is not a table of scores.
    """
    try:
        table = load_table(path, TEXTS, strings_can_be_null=True, quoted_strings_can_be_null=False)
        kinds = {**dict.fromkeys(TEXTS, pa.string()), **dict.fromkeys(SIDES, pa.int32())}
        return table.cast(pa.schema([(name, kinds.get(name, pa.float32())) for name in table.column_names]))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"output: {path} is damaged ({first_line(error)}); delete it, and it is made anew") from error


def summarise(listed: ImageList, table: pa.Table) -> str:
    """Return a text for the user: number and range of scores, reasons and names of images without one, and remarks."""
    problems = [(row, problem) for row, problem in enumerate(table["problem"].to_pylist()) if problem is not None]
    good = len(listed.rows) - len(problems)
    text = f"{good} of {len(listed.rows)} images have a score"
    if good:
        text += f", {pc.min(table['score']).as_py():.4f} to {pc.max(table['score']).as_py():.4f}"
    if problems:
        reasons = Counter(problem.partition(" (")[0] for _, problem in problems)
        names = [f"{listed.rows[row].name or listed.rows[row].detail.partition(':')[0]}" for row, _ in problems[:NAMED]]
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        text += f"\nwithout a score: {count_text(reasons)}: {', '.join(map(short, names))}{more}"
    if listed.remarks:
        text += f"\nremarks: {'; '.join(listed.remarks[:NAMED])}"
        text += f" and {len(listed.remarks) - NAMED} more" if len(listed.remarks) > NAMED else ""
    return text
