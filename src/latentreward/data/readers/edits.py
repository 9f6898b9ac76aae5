"""Reader of published sets of image edits: an instruction, pictures to edit, two results, and which is better."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError, did_you_mean, quoted
from latentreward.data.readers.json_rows import SOURCES, list_sources, parse_number, parse_text, short
from latentreward.data.readers.rows import (
    BAD_LABEL,
    NO_LABEL,
    SCORED_AXES,
    BadRow,
    Pair,
    PairRowParser,
    Row,
    RowReader,
    compare,
    ranked_pairs,
)
from latentreward.data.readers.tables import Source, find_list, open_table, read_list, source_name

Axis = Literal["overall", "instruction_following", "visual_quality"]
HINT = "give the published files, or name the layout"
RANKING = re.compile(r"[A-Z]([>=][A-Z])*")
WINS = ("leftvote", "a", "image a", "response_a", "preference")
LOSES = ("rightvote", "b", "image b", "response_b")
TIES = ("tie", "tievote", "bothbad_vote")
VERDICTS = dict.fromkeys(WINS, 1.0) | dict.fromkeys(LOSES, 0.0) | dict.fromkeys(TIES, 0.5)
"""Published verdicts, in lower case → probability that the first image is preferred."""
FIRST_ROWS = 64
"""Rows of a JSON file whose fields tell its layout."""
NO_RANKING = "ranking not readable"
NO_TIE = ("", "0", "0.0", "no", "none", "null", "false")
MARKS = dict.fromkeys(("1", "1.0", "yes", "true"), 0.5) | dict.fromkeys(NO_TIE, 1.0)
"""Value of a field that marks ties, as a text in lower case → label of the first image."""


@dataclass(frozen=True)
class Layout:
    """Names of the fields of a set; ``FIELD.0`` is the first item of a list, ``FIELD.NAME`` that of an object."""

    prompt: str  # instruction
    source: str  # picture to edit, or a list of them
    images: tuple[str, ...]  # the two results; a single field is a list of all results, ranked by ``verdict``
    verdict: str = ""  # who won; empty where the first result is the better one
    models: tuple[str, ...] = ()  # names of the two generators
    axes: Mapping[Axis, tuple[str, str]] = field(default_factory=dict)  # scores of the two results
    tie: str = ""  # marks ties in spite of the order
    group: str = ""  # its text, up to the first ``_``, is the group of pairs that a benchmark counts together
    tags: tuple[str, ...] = ()  # by which a benchmark's report splits the pairs

    def columns(self) -> list[str]:
        """Return the fields without images, those that every file must have first."""
        scores = [score for pair in self.axes.values() for score in pair]
        return list(filter(None, [self.prompt, self.verdict, *self.models, *scores, self.tie, self.group, *self.tags]))

    def fits(self, names: Collection[str]) -> bool:
        """Tell whether a file with these fields has this layout."""
        return {
            name.partition(".")[0] for name in (self.prompt, self.source, *self.images, self.verdict) if name
        } <= names


def _sides(name: str) -> tuple[str, str]:
    return f"left_{name}", f"right_{name}"


LAYOUTS = {
    "editreward_data": Layout(
        *("prompt", "path_src", ("path1", "path2")),
        models=("model1", "model2"),
        axes={
            "overall": ("model1_overall_score", "model2_overall_score"),
            "instruction_following": ("model1_dim1_score", "model2_dim1_score"),
            "visual_quality": ("model1_dim2_score", "model2_dim2_score"),
        },
        tie="tie_case",
    ),
    "editreward_data_hub": Layout(
        *("instruction", "source_image", _sides("image"), "vote_type", _sides("model")),
        axes={
            "overall": _sides("overall_score"),
            "instruction_following": _sides("instruction_following_score"),
            "visual_quality": _sides("quality_aesthetic_score"),
        },
        tags=("category",),
    ),
    "editreward_bench": Layout(
        *("instruction", "source_image", ("candidate_1", "candidate_2"), "ranking", ("model_1", "model_2")),
        axes={
            "overall": ("score_1", "score_2"),
            "instruction_following": ("instruction_following_1", "instruction_following_2"),
            "visual_quality": ("visual_quality_1", "visual_quality_2"),
        },
        group="id",
        tags=("dataset", "comparison_type"),
    ),
    "editreward_bench_json": Layout("prompt", "path_src", ("paths_generated",), "human_vote.ranking"),
    "editscore_bench": Layout(
        *("instruction", "input_image", ("output_images.0", "output_images.1")), tags=("dimension", "task_type")
    ),
    "genai_bench_edits": Layout(
        *("instruct_prompt", "source_image", _sides("output_image"), "vote_type", _sides("model"))
    ),
    "editreward_compass": Layout("prompt", "source_image", ("winner", "loser"), "label", tags=("dimension",)),
    "vcreward_bench": Layout(
        *("instruction", "source_image", ("edited_images.0", "edited_images.1"), "winner"), tags=("task",)
    ),
    "mmrb2": Layout(
        *("prompt_text", "prompt_images", ("response_a_images.0", "response_b_images.0"), "chosen"),
        models=("response_a_model", "response_b_model"),
    ),
}
"""Name of a layout → its fields, as loaders, cards or mirrored rows of the data sets show them."""


class EditPairReader(RowReader):
    """Reader of published sets of image edits, by the names of their fields.

    ``LAYOUTS`` lists the sets. JSON and JSON lines name image files; tables hold the images. Where the file names the
    better result first, the sides change at random; a row that it marks as a tie (``tie_case``) has label ½. K ranked
    results give K (K − 1) / 2 pairs. A row without a known verdict is bad, one with a null verdict unlabelled.

    Args:
        source: JSON file, or a file of JSON lines; folder that holds ``{split}.json`` or ``{split}.jsonl``; otherwise a
            table, see :class:`~latentreward.data.DatasetPairReader`.
        split: Name of the split.
        layout: Name of the layout; None recognises it by the fields.
        axis: ``overall`` labels pairs by the published verdict. The other axes label them by the published scores of
            this axis, equal scores being a tie.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        config: Name of the configuration, where the hub data set has several, e.g. ``image_edition`` of GenAI-Bench.
        root: Folder that paths are relative to and that all images must lie in; by default the file's folder.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif = "ignore"

    def __init__(
        self,
        source: Source,
        split: str = "train",
        *,
        layout: str | None = None,
        axis: Axis = "overall",
        revision: str | None = None,
        config: str | None = None,
        root: PathText | None = None,
        **options: Any,
    ) -> None:
        name = source_name(source)
        super().__init__(Path(name).stem, split, **options)
        file = find_list(source, split)
        if file and Path(source).is_dir():
            self.check_inside(source, file)
        self.folder = Path(root) if root else file and file.parent
        table = None if file else open_table(self, source, split, revision, config)
        rows: Iterable[Row] = [*read_list(file)] if file else []
        read = (row for _, _, row in [*rows][:FIRST_ROWS] if isinstance(row, dict))
        names = {*table.schemas()[0][1].names} if table else set().union(*read)
        if layout is not None and layout not in LAYOUTS:
            raise InputError(f"layout is {layout!r}{did_you_mean(layout, LAYOUTS)}; choose from {', '.join(LAYOUTS)}")
        found = layout or find_layout(names)
        if found is None or not LAYOUTS[found].fits(names):
            there = quoted(f"it has {', '.join(sorted(map(str, names))[:12])}")
            raise InputError(f"{name}: has not the fields of {layout or 'a known set of edits'} ({there}); {HINT}")
        self.source, self.layout, self.axis = found, LAYOUTS[found], axis
        if axis != "overall" and not names.issuperset(self.layout.axes.get(axis, [""])):
            raise InputError(f"axis: {name} has no scores of {axis}; set overall, by which its pairs are judged")
        if table is not None:
            images = [*dict.fromkeys(image.partition(".")[0] for image in (*self.layout.images, self.layout.source))]
            table.check_images(images, HINT, lists=True)
            rows = table.records(dict.fromkeys(column for column in self.layout.columns() if column in names), HINT)
            table.open_images(images)
            self.images_in = table, images
            self.sources_in = (table, self.layout.source) if self.sources == "read" else None
        prompt, check = {"prompt": self.layout.prompt}, self.check_path if file else None
        self._parser = PairRowParser(self, self._pairs, columns=prompt, sources=None, check_image=check)
        scores = dict.fromkeys((f"{axis}_{side}" for axis in SCORED_AXES for side in "ab"), pa.float64())
        self.table = self._parser.table(rows, {**scores, "tags": pa.list_(pa.string())})
        self.report(f"{name} {split}", f"split: {split!r} of {name} has no rows left; check the files")

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        if self.images_in is None:
            return super().find_images(row)
        table, columns = self.images_in
        values = dict(zip(columns, table.read(row["row"], columns), strict=True))
        return self.embedded_images([_value(values, image) for image in self.layout.images])

    def _pairs(self, name: str, row: dict[str, Any]) -> Sequence[Pair]:
        layout, parser = self.layout, self._parser
        shared: Pair = {"winner_first": not layout.verdict, **self._facts(row)}
        shared |= {f"model_{side}": parse_text(row.get(one)) for side, one in zip("ab", layout.models, strict=False)}
        if layout.group and (group := parse_text(row.get(layout.group))):
            shared["group_id"] = group.partition("_")[0]
        images, verdict = [_value(row, image) for image in layout.images], _value(row, layout.verdict)
        if self.images_in is None and self.sources == "read":
            shared |= parser.edited(name, *list_sources({SOURCES[0]: row.get(layout.source)}, SOURCES[:1]))
        if len(images) == 1:
            if (ranks := _ranks(verdict, images[0])) is None:
                raise BadRow(f"{layout.verdict} is {short(verdict)}, no ranking of {layout.images[0]}", NO_RANKING)
            return ranked_pairs(name, [*map(parse_text, images[0])], ranks, group_id=name, **shared)
        for side, image in zip("ab", images if self.images_in is None else (), strict=False):
            shared[f"image_{side}"] = parse_text(image)
            parser.check_image(name, f"image_{side}", image)  # type: ignore[misc]
        if (label := self._judge(row, verdict)) is None:
            self.remarks[NO_LABEL] += 1
        return [{**shared, "label": label}]

    def _facts(self, row: Mapping[str, Any]) -> Pair:
        """Return the published scores and tags of a row, those that it has."""
        facts: Pair = {}
        for axis, scores in self.layout.axes.items():
            facts |= {f"{axis}_{side}": parse_number(row.get(one)) for side, one in zip("ab", scores, strict=True)}
        tags = [text for tag in self.layout.tags if (text := parse_text(row.get(tag)))]
        return {**facts, "tags": tags} if tags else facts

    def _judge(self, row: Mapping[str, Any], verdict: Any) -> float | None:
        """Return the label of a row's first result, None for no label; raise BadRow for what is no verdict."""
        layout = self.layout
        if self.axis != "overall":
            return compare(*(parse_number(row.get(score)) for score in layout.axes[self.axis]))
        if layout.tie:
            field, value, meanings = layout.tie, row.get(layout.tie), MARKS
        elif not layout.verdict:
            return 1.0
        else:
            field, value, meanings = layout.verdict, verdict, VERDICTS
        text = str(value).strip()
        if not layout.tie and re.fullmatch(r"([A-Z])[>=](?!\1)[A-Z]", text):  # of A to D, the first is nearer to A
            return 0.5 if text[1] == "=" else float(text[0] < text[2])
        if (label := meanings.get(text.lower())) is None and (layout.tie or value is not None):
            raise BadRow(f"{field} is {short(value)}, no verdict", BAD_LABEL)
        return label


def find_layout(names: Collection[str]) -> str | None:
    """Return the name of the layout of a file with these fields; None if no known set of edits has them."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(names)), None)


def _value(row: Mapping[str, Any], path: str) -> Any:
    name, _, inner = path.partition(".")
    value = row.get(name)
    if not inner:
        return value
    if inner.isdigit():
        return value[int(inner)] if isinstance(value, list) and int(inner) < len(value) else None
    return value.get(inner) if isinstance(value, dict) else None


def _ranks(ranking: Any, paths: Any) -> list[int] | None:
    """Return the rank of each path by a text such as ``A>B=C``; None if the text does not rank all of them."""
    text = ranking.replace(" ", "") if isinstance(ranking, str) else ""
    if not isinstance(paths, list) or not RANKING.fullmatch(text):
        return None
    ranks = {letter: rank for rank, equal in enumerate(text.split(">")) for letter in equal.split("=")}
    letters = [chr(ord("A") + place) for place in range(len(paths))]
    return [ranks[letter] for letter in letters] if sorted(ranks) == letters else None
