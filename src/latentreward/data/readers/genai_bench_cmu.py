"""Reader of CMU's GenAI-Bench: parquet files with images of six models for each prompt, rated by people."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.data.readers.groups import UNRANKED, ImageGroup, pair_images
from latentreward.data.readers.json_rows import parse_json, parse_number, short
from latentreward.data.readers.rows import RowReader
from latentreward.data.readers.tables import Source, open_table, source_name

HINT = "give the published files, with a column of images for each rated model"
RATED = "_HumanRating"
OLDER_FILE = "GenAI-Bench.parquet"
LOWEST, HIGHEST = 1, 5
SKILLS = ("basic", "advanced")


class GenAIBenchCMUReader(RowReader):
    """Reader of CMU's GenAI-Bench: pairs of images of several models for a prompt, compared by mean human rating.

    A row with n models (six as published) gives n (n − 1) / 2 pairs, in the order of the models' names, with the row's
    ``Index`` as ``group_id``. Equal means are a tie (½) and are kept. Pairs of an image without ratings are unlabelled;
    a null rating is left out of the mean. A null prompt is read as an empty prompt, and a null image counts as
    unreadable. A row falls under ``on_error`` if a rating is not a number from 1 to 5 or its prompt is too long. An
    image is named by a hash of its bytes. The older revision, with a text column ``{model}_HumanRating`` for each
    model, can be read too.

    The constructor reads all columns but the images. Reading a row in random order decodes its whole row group,
    hundreds of MiB in the published file; reading rows in order decodes each row group once.

    Args:
        source: Folder that holds ``{split}-*.parquet``, directly or in ``data/``, ``{split}.parquet`` or
            ``GenAI-Bench.parquet``; one parquet file or a pattern of files; a folder that ``save_to_disk`` wrote;
            otherwise the id of a hub data set. From Python also a ``Dataset`` or ``DatasetDict``.
        split: Name of the split; only ``train`` is published, although the data set is a benchmark.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        memory_map: Copy the images once into the cache of ``datasets``. Reading a row in random order then reads only
            this row.
        options: See :class:`~latentreward.data.readers.rows.RowReader`. Under ``skip`` and ``placeholder`` a
            split with missing files is read without them.

    Raises:
        InputError: If the split cannot be found, lacks a file, a column or rows, or breaks a rule above under
            ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        source: Source,
        split: str = "train",
        *,
        revision: str | None = None,
        memory_map: bool = False,
        **options: Any,
    ) -> None:
        super().__init__("genai_bench_cmu", split, **options)
        if isinstance(source, str) and Path(source, OLDER_FILE).is_file():
            source = str(Path(source, OLDER_FILE))
        self._table = open_table(self, source, split, revision)
        (place, schema), *_ = self._table.schemas()
        self.models, columns = _columns(place, schema)
        self._table.check_images(self.models, HINT)
        kept: list[int] = []
        tags: list[list[str]] = []
        index = self._table.read_index(columns, HINT)
        pairs = pair_images(self._parse(index, kept, tags))
        numbers = {side: pairs.column(f"number_{side}").to_numpy() for side in "ab"}
        group = numbers["a"] // len(self.models)
        models = {f"model_{side}": pa.array(self.models).take(numbers[side] % len(self.models)) for side in "ab"}
        shown = {"tags": pa.array(tags, pa.list_(pa.string())).take(group), "row": np.array(kept, np.int64)[group]}
        self.table = pa.table({**dict(zip(pairs.column_names, pairs.columns, strict=True)), **models, **shown})
        self._table.open_images(self.models, memory_map)
        name = source_name(source)
        self.report(f"{name} {split}", f"split: {split!r} of {name} has no pairs left; check the files")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to two images with their bytes from the parquet file."""
        return self.embedded_images(self._table.read(row["row"], [row["model_a"], row["model_b"]]))

    def _parse(self, index: pa.Table, kept: list[int], tags: list[list[str]]) -> Iterator[ImageGroup]:
        """Yield a group for every row, and add its number to ``kept`` and the skills of its prompt to ``tags``."""
        names = self._table.row_names().to_pylist()
        for number, (name, row) in enumerate(zip(names, index.to_pylist(), strict=True)):
            if "HumanRatings" in row:
                row_id, prompt, found = row["Index"], row["Prompt"], row["HumanRatings"] or {}
                ratings = [found.get(model) for model in self.models]
            else:  # the older revision
                row_id, prompt, ratings = row["id"], row["prompt"], [row[model + RATED] for model in self.models]
            if prompt is None:
                self.remarks["null prompt read as empty"] += 1
            means = [_mean(rating) for rating in ratings]
            if len(prompt or "") > self.max_prompt_chars:
                self.refuse_long_prompt(name, len(prompt))
                if self.on_error == "skip":
                    continue
                prompt, means = None, [UNRANKED] * len(means)
            if None in means:
                first = means.index(None)
                problem = f"ratings of {self.models[first]} are {short(ratings[first])}, not numbers from 1 to 5"
                self.refuse(name, problem, "rating not readable")
                if self.on_error == "skip":
                    continue
                means = [UNRANKED] * len(means)
            if missing := int(np.isnan(means).sum()):
                self.remarks["image without ratings"] += missing
            kept.append(number)
            # Either revision names the skills, of which an advanced one makes the prompt advanced.
            skills = row.get("Tags") or {name: row.get(f"{name}_skills") for name in SKILLS}
            basic, advanced = (_texts(skills.get(kind)) for kind in SKILLS)
            tags.append([SKILLS[bool(advanced)], *basic, *advanced] if basic or advanced else [])
            ranks = [-mean for mean in means if mean is not None]
            yield ImageGroup(name, prompt or "", [None] * len(ranks), ranks, row_id)


def _columns(place: str, schema: pa.Schema) -> tuple[list[str], dict[str, pa.DataType | None]]:
    """Return the sorted names of rated models, and the columns without images to read; for either revision."""
    tags = {name: None for name in ("Tags", *(f"{kind}_skills" for kind in SKILLS)) if name in schema.names}
    if "HumanRatings" in schema.names and pa.types.is_struct(kind := schema.field("HumanRatings").type):
        models = sorted(kind.field(number).name for number in range(kind.num_fields))
        return models, {"Index": pa.string(), "Prompt": pa.large_string(), "HumanRatings": None, **tags}
    models = sorted(name.removesuffix(RATED) for name in schema.names if name.endswith(RATED))
    if not models:
        raise InputError(f"{place}: no column HumanRatings; {HINT}")
    rated = {model + RATED: None for model in models}
    return models, {"id": pa.string(), "prompt": pa.large_string(), **rated, **tags}


def _texts(value: Any) -> list[str]:
    """Convert a list of texts, or a text with a JSON list or words separated by commas, to a list of texts."""
    if isinstance(value, str):
        value = parse_json(value, [part.strip(" '\"[]") for part in value.split(",")])
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []


def _mean(ratings: Any) -> float | None:
    """Return the mean over raters, NaN if there are no ratings; None if a rating is not a number from 1 to 5."""
    if isinstance(ratings, str):
        ratings = parse_json(ratings, ratings)
    if ratings is None:
        return UNRANKED
    if not isinstance(ratings, list):
        return None
    numbers = [parse_number(rating) for rating in ratings if rating is not None]
    valid = [number for number in numbers if number is not None and LOWEST <= number <= HIGHEST]
    if len(valid) < len(numbers):
        return None
    return sum(valid) / len(valid) if valid else UNRANKED
