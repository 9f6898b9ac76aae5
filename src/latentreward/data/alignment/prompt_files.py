"""Reading of prompt files, and of sets of prompt files with groups for evaluation."""

import glob
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentreward.core.contracts import EditPrompt, ImageRef, sources_of
from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.storage.json_files import read_text
from latentreward.core.storage.user_files import find_files, split_pattern, whole_file
from latentreward.data.image_lists import read_rows
from latentreward.data.images import ImageError, file_image, read_header
from latentreward.data.readers.base import MAX_PROMPT_CHARS
from latentreward.data.readers.json_rows import (
    MOST_SOURCES,
    SOURCES,
    find_edit_source,
    list_sources,
    short,
)
from latentreward.data.readers.rows import embedded_image

COLUMNS = ("prompt", "caption", "Prompt")
"""Names of the prompt column in order of preference: this project's, that of Pick-a-Pic and LPO, PartiPrompts'."""
GROUPS = ("tag", "Category")
"""Names of the column with the group of a prompt: GenEval's and PartiPrompts'."""
FORMATS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
COMMENT = re.compile(r"\s*#(\s|$)")
logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a set."""

    prompt: str  # raw text; an EditPrompt if it edits pictures
    group: str = ""  # kind of prompt; evaluation reports results by group. Empty if the file has none
    # whole row but for pictures to edit, for programs that score; empty for a line of text
    fields: Row = field(default_factory=dict)


def read_prompts(path: str, setting: str = "data.prompts", max_prompt_chars: int = MAX_PROMPT_CHARS) -> tuple[str, ...]:
    """Read the distinct prompts of a file, in the file's order, without blank ones.

    A text holds one prompt per line; lines that begin with ``# `` are comments. JSON lines, a JSON list, CSV, TSV and
    parquet have a column ``prompt``, ``caption`` or ``Prompt``. A JSON object counts by its list ``prompts``, or, as in
    MJHQ-30K, by its values if all are objects with such a field. A column ``source_images`` or ``source_image`` has the
    pictures that a prompt edits: paths in the file's folder, in CSV one path or a JSON list of them, and in parquet
    also bytes. ``setting`` names the file's setting in messages.
    """
    return tuple(dict.fromkeys(row.prompt for row in read_prompt_rows(path, setting, max_prompt_chars)))


def read_prompt_rows(path: str, setting: str = "prompts", max_prompt_chars: int = MAX_PROMPT_CHARS) -> list[PromptRow]:
    """Read all prompts of a file, see :func:`read_prompts`, with their groups; repeated ones included, no blank ones.

    A column ``tag`` (GenEval) or ``Category`` (PartiPrompts) is the group.
    """
    file = Path(path)
    with errors_at(f"{setting}: "):
        if file.suffix.lower() not in FORMATS:
            raise InputError(f"{path} is none of {', '.join(FORMATS)}; give a text file with one prompt per line")
        if not file.is_file():
            raise InputError(f"{path} does not exist; give a text file with one prompt per line")
        try:
            rows = [_parse(number, value, path) for number, value in enumerate(_read(file), start=1)]
        except InputError:
            raise
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}); correct it") from error
        blank = [number for number, row in enumerate(rows, start=1) if not row.prompt.strip()]
        rows = [row for row in rows if row.prompt.strip()]
        if not rows:
            raise InputError(f"{path} holds no prompt; write one per line")
        if blank and file.suffix.lower() != ".txt":  # blank lines of a text are no rows
            logger.warning("%s: %d rows without a prompt are left out, the first is row %d", path, len(blank), blank[0])
        if long := next((row.prompt for row in rows if len(row.prompt) > max_prompt_chars), None):
            problem = f"a prompt of {len(long)} characters, more than {max_prompt_chars=}: {short(long)}"
            raise InputError(f"{path} holds {problem}; shorten it")
        return rows


def read_prompt_set(path: str, max_prompt_chars: int = MAX_PROMPT_CHARS) -> list[PromptRow]:
    """Read the prompts of one file, or of all files that a pattern matches, with their groups.

    Under a pattern, a prompt without a group of its own gets its file's name, without suffix and ``_val``, as group.
    For T2I-CompBench++ the pattern is ``examples/dataset/*_val.txt``, with groups ``color``, ``shape``, ...; for the
    benchmark of HPSv2 it is ``benchmark/[!d]*.json``, with groups ``anime``, ``concept-art``, ``paintings`` and
    ``photo``.
    """
    if Path(path).exists() or not glob.has_magic(path):
        return read_prompt_rows(path, max_prompt_chars=max_prompt_chars)
    files = find_files(*split_pattern(path))
    if not files:
        raise InputError(f"prompts: no file matches {path}; give a file of prompts, or a pattern that matches some")
    return [
        PromptRow(row.prompt, row.group or file.stem.removesuffix("_val"), row.fields)
        for file in files
        for row in read_prompt_rows(str(file), max_prompt_chars=max_prompt_chars)
    ]


def _read(file: Path) -> Iterator[Any]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        table = pq.ParquetFile(whole_file(file), page_checksum_verification=True)
        names = table.schema_arrow.names  # other columns, such as Pick-a-Pic's images, are not read
        kept = [name for name in (*COLUMNS, *GROUPS, *SOURCES) if name in names]
        edited = dict.fromkeys((name for name in names if name not in SOURCES and find_edit_source({name: True})), True)
        if not any(name in COLUMNS for name in kept):
            yield dict.fromkeys(names) | edited  # the caller tells that no column has a prompt, and which there are
        yield from ({**row, **edited} for row in table.read(kept).to_pylist())
    elif suffix == ".txt":
        # Comments are blank here, so that the numbers of rows are those of lines.
        yield from ("" if COMMENT.match(line) else line.strip() for line in re.split(r"\r\n?|\n", read_text(file)))
    else:
        for number, value, problem in read_rows(file, "give a list of prompts, or one as 'prompts'", _as_list):
            if problem:
                raise InputError(f"{file}: line {number}: {problem}; correct it")
            yield value


def _as_list(content: Any) -> Any:
    """Return an object's list ``prompts``, or its values if each one has a prompt; anything else as it is."""
    if isinstance(content, dict):
        if isinstance(prompts := content.get("prompts"), list):
            return prompts
        if content and all(isinstance(row, dict) and not row.keys().isdisjoint(COLUMNS) for row in content.values()):
            return [*content.values()]
    return content


def _parse(number: int, row: Any, path: str) -> PromptRow:
    """Return the prompt of a row, a text or an object; ``number`` counts the rows that are not blank."""
    named: Row = {COLUMNS[0]: row} if isinstance(row, str) else row
    if not isinstance(named, Mapping):
        raise ValueError(f"row {number} holds {short(row)}, neither a text nor an object with a text 'prompt'")
    if (source := find_edit_source(named, SOURCES)) is not None:
        told = f"{path}: row {number} is an edit of a picture, in {short(source)}"
        raise InputError(f"{told}; name it {SOURCES[0]}, or leave the column out to draw from the texts alone")
    column = next((name for name in COLUMNS if name in named), None)
    if column is None:
        told = f"{path}: row {number} has no column 'prompt' or 'caption'"
        raise InputError(f"{told} (it has: {', '.join(map(short, [*named][:12]))}); rename that of the texts")
    text = named[column]
    if not isinstance(text, str):
        raise ValueError(f"row {number} holds {short(text)} as {column}, not text")
    text.encode()  # raises UnicodeEncodeError (a ValueError) for a lone surrogate, which tokenizers refuse
    group = next((str(named[name]) for name in GROUPS if named.get(name)), "")
    with errors_at(f"{path}: row {number}"):
        sources = row_sources(named, Path(path).parent)
    if not sources:
        return PromptRow(text, group, {} if isinstance(row, str) else named)
    return PromptRow(EditPrompt(text, sources), group, {key: named[key] for key in named if key not in SOURCES})


def row_sources(row: Row, folder: Path) -> list[ImageRef]:
    """Return the pictures to edit of a row, files of ``folder`` or bytes; raise InputError if one cannot be read."""
    name, values = list_sources(row)
    if len(values) > MOST_SOURCES:
        raise InputError(f" has {len(values)} pictures in {name}; give at most {MOST_SOURCES}")
    if odd := [one for one in values if not isinstance(one, str | bytes | dict) or not one]:
        raise InputError(f" has {short(odd[0])} in {name}; give a path")
    inside = partial(file_image, folder)
    sources = [file_image(folder, one) if isinstance(one, str) else embedded_image(one, None, inside) for one in values]
    for picture in sources:
        try:
            read_header(picture)
        except ImageError as error:
            raise InputError(f": {error}; replace the file, or leave the row out") from error
    return sources


def source_files(place: int, prompt: str) -> dict[str, ImageRef]:
    """Return the pictures that the prompt at index ``place`` edits by the names of their copies beside a list."""
    images = enumerate(sources_of(prompt))
    return {f"sources/{place:05d}_{number}{Path(image.image_key).suffix[:8]}": image for number, image in images}
