"""Sections of the report: for each kind of result its heading, an explanation of the numbers, tables and figures."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from latentreward.apps.evaluation.benchmark import plots
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.apps.evaluation.benchmark.results import AVERAGE, BenchmarkPairs, BenchmarkReport
from latentreward.core.contracts import sources_of
from latentreward.core.errors import InputError
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.tables import (
    NOTHING,
    Column,
    Row,
    Section,
    Table,
    cell,
    grouped,
    interval,
    percent,
    with_interval,
    without_unset,
)
from latentreward.data import ImageError, PairReader, decode_image
from latentreward.reward import ImageScorer, RewardModelScorer, ScoringNoise


class NoiseColumns(ImageScorer):
    """Scorer with several columns: the latent reward's own score, that score with other noise, and one per noise level.

    A model with two axes has a column for each of them too, with the noise of its own score. Images are encoded once
    for all columns.

    Args:
        scorer: The latent reward.
        levels: Noise levels in [0, 1]; each is scored with the seeds of the reward's own noise.
        draws: Number of noise draws at the reward's own noise levels, at least 1; the first one gives its own score.
    """

    def __init__(self, scorer: RewardModelScorer, levels: Sequence[float], draws: int) -> None:
        super().__init__(scorer.name, scorer.batch_size)
        if len(set(levels)) < len(levels):
            raise InputError(f"levels={list(levels)} holds a level twice; leave one")
        self.scorer, self.levels, self.draws = scorer, tuple(levels), draws
        for level in levels:
            ScoringNoise(sigmas=(level,))
        # Names of the scores with the second and further noise draws, and of those at the single noise levels.
        self.draw_columns = tuple(f"{self.name} draw {draw}" for draw in range(1, draws))
        self.level_columns = tuple(f"{self.name} sigma {level:g}" for level in levels)

    @property
    def axis_columns(self) -> dict[str, str]:
        """Axis of the model → name of its scores; empty for a model with one score."""
        return {axis: f"{self.name} {axis}" for axis in self.scorer.axes}

    @property
    def columns(self) -> tuple[str, ...]:
        """Name of the reward's own score, then :attr:`draw_columns`, :attr:`level_columns`, :attr:`axis_columns`."""
        return self.name, *self.draw_columns, *self.level_columns, *self.axis_columns.values()

    def identity(self) -> str:
        """Return the reward's identity with the number of draws and the noise levels."""
        return f"{self.scorer.identity()}, {self.draws} draws, levels {list(self.levels)}"

    def prepare(self) -> None:
        self.scorer.prepare()

    def timesteps(self) -> list[float]:
        """Return the timestep of the model's noise process for each noise level."""
        process = self.scorer.model.backbone.noise_process
        return process.timesteps_at(torch.tensor(self.levels)).tolist()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Score B images: ``(B, K)`` for K columns, or ``(B,)`` for one; see :meth:`ImageScorer.score`."""
        own = self.scorer.noise or self.scorer.model.noise
        step = max(own.seeds) - min(own.seeds) + 1  # so that no two draws share a seed
        noises = [replace(own, seeds=tuple(seed + draw * step for seed in own.seeds)) for draw in range(self.draws)]
        noises += [replace(own, sigmas=(level,), timesteps=()) for level in self.levels]
        if self.axis_columns:
            outputs = self.scorer.score_levels(prompts, images, noises, axes=True)
            return torch.cat([self.scorer.model.head.total(outputs), outputs[:, 0]], dim=1)
        scores = self.scorer.score_levels(prompts, images, noises)
        return scores if len(self.columns) > 1 else scores[:, 0]


LONGEST_PROMPT = 400
"""Most characters of a prompt shown on the page."""
Pictures = Mapping[tuple[str, int], Sequence[Image.Image | None]]
"""(data set and split, row) → images a and b, and the pictures that they edit; None for one that cannot be read."""


def most_disputed(scored: Sequence[BenchmarkPairs], count: int) -> list[Row]:
    """Return the pairs on which two scorers disagree most; with one scorer, the pairs on which it errs most.

    A gap g is the score of image a minus that of image b, in units of the scorer's root mean square gap. With several
    scorers, pairs are ranked by min(max g, −min g) over the scorers, which is positive where two scorers prefer
    different images. With one scorer, pairs are ranked by its gap in favour of the image that people did not prefer.
    At most one pair of each prompt group is returned.
    """
    gaps, first = np.stack([pairs.gap for pairs in scored]), scored[0]
    for number, own in enumerate(gaps):
        finite = own[np.isfinite(own)]
        typical = np.sqrt(np.mean(np.square(finite))) if len(finite) else 0.0
        gaps[number] = own / typical if typical > 0 else own
    if len(scored) == 1:
        tells = -gaps[0] * np.sign(first.labels - 0.5)
    else:
        known = np.nan_to_num(gaps, nan=0.0)
        tells = np.minimum(known.max(axis=0), -known.min(axis=0))
    tells = np.nan_to_num(tells, nan=0.0)
    rows: dict[str, Row] = {}
    for row in np.argsort(-tells, kind="stable").tolist():
        if len(rows) == count or tells[row] <= 0:
            break
        if first.groups[row] in rows:
            continue
        finite = [(pairs, gap) for pairs, gap in zip(scored, gaps[:, row].tolist(), strict=True) if np.isfinite(gap)]
        rows[first.groups[row]] = {
            "benchmark": first.benchmark,
            "row": row,
            "pair_id": first.pair_ids[row],
            "prompt": first.prompts[row],
            "label": None if np.isnan(first.labels[row]) else float(first.labels[row]),
            "scores": {pairs.scorer: (float(pairs.first[row]), float(pairs.second[row])) for pairs, _ in finite},
            "gaps": {pairs.scorer: gap for pairs, gap in finite},
        }
    return list(rows.values())


def disagreement_pictures(telling: Iterable[Row], readers: Mapping[str, PairReader]) -> Pictures:
    """Read the images of pairs, and those that they edit; ``readers`` are those of data sets and splits."""
    pictures: dict[tuple[str, int], Sequence[Image.Image | None]] = {}
    for row in telling:
        reader = readers[row["benchmark"]]
        pair, found = reader[row["row"]], list[Image.Image | None]()
        for image in (pair.image_a, pair.image_b, *sources_of(pair.prompt)):
            try:
                found.append(decode_image(image, exif=reader.exif))
            except ImageError:
                found.append(None)
        pictures[row["benchmark"], row["row"]] = found
    return pictures


def disagreement_card(pair: Row, pictures: Pictures) -> dict[str, Any]:
    """Return the values of a pair's card: images, prompt, people's choice, and scores and gap of each model."""
    label = 0.5 if pair["label"] is None else pair["label"]
    left, right, *sources = pictures.get((pair["benchmark"], pair["row"]), (None, None))
    prompt = pair["prompt"]
    return {
        "pair_id": pair["pair_id"],
        "prompt": f"{prompt[:LONGEST_PROMPT]}…" if len(prompt) > LONGEST_PROMPT else prompt,
        "people": preferred(pair["label"]),
        "sources": [None if image is None else picture_uri(image) for image in sources],
        "pictures": [
            {
                "uri": None if image is None else picture_uri(image),
                "alt": f"{side} image of the pair, for the prompt below",
                "chosen": (label - 0.5) * sign > 0,
            }
            for side, image, sign in (("Left", left, 1), ("Right", right, -1))
        ],
        "rows": [
            {
                "scorer": scorer,
                "scores": [f"{score:.4g}" for score in pair["scores"][scorer]],
                "gap": f"{gap:+.2f}",
                "right": None if label == 0.5 else bool(gap * (label - 0.5) > 0),
            }
            for scorer, gap in pair["gaps"].items()
        ],
    }


def preferred(label: float | None) -> str:
    """Return in words which image people preferred; ``label`` is the probability of the left image."""
    if label is None:
        return "no label"
    if label == 0.5:
        return "tie"
    side = "left" if label > 0.5 else "right"
    return side if label in (0, 1) else f"{side} ({max(label, 1 - label):.0%})"


LARGEST = 25
"""Most rows of a table of sub-groups."""
TITLE = "Benchmark of reward models"
TEXTS: Mapping[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
INTRODUCTION = TEXTS["introduction"]
PUBLISHED = f" {TEXTS['published']}"
"""Text after that of a section with published numbers."""


def temperature(value: float) -> str:
    """Format a temperature with three digits; inf means that larger gaps do not win more often."""
    return f"{value:.3g}" if math.isfinite(value) else "none (larger gaps do not win)"


def _correlation(row: Row, name: str) -> str:
    """Format an interval with two digits after the point, and never as ``-0.00``."""
    return with_interval(row[name], lambda value: NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}")


DATA: Column = ("data", "benchmark")
PROTOCOL: Column = ("protocol", "protocol")
MODEL: Column = ("model", "scorer")
ACCURACY: tuple[Column, ...] = (
    ("accuracy %", lambda row: percent(row["estimate"].value)),
    ("95 % interval", lambda row: interval(row["estimate"])),
)


@dataclass(frozen=True)
class Kind:
    """Kind of result with a section of its own."""

    title: str  # heading
    columns: tuple[Column, ...]  # columns of the section's table
    # Function that draws the results of one data set and protocol
    figure: Callable[[Sequence[Row]], plots.Drawn] | None = None


KINDS = {
    "differences": Kind(
        "Differences between models",
        (
            *(DATA, PROTOCOL, ("model", "first"), ("against", "second"), ("pairs", "pairs")),
            ("difference in points", "estimate"),
            ("interval excludes 0", lambda row: "yes" if row["estimate"].low > 0 or row["estimate"].high < 0 else "no"),
        ),
    ),
    "levels": Kind(
        "Accuracy by noise level",
        (DATA, PROTOCOL, MODEL, ("noise level", "sigma"), ("timestep", "timestep"), ("accuracy %", "estimate")),
        plots.level_figure,
    ),
    "calibration": Kind(
        "Calibration",
        (
            *(DATA, PROTOCOL, MODEL),
            ("temperature", lambda row: temperature(row["temperature"])),
            ("calibration error %", "error"),
        ),
        plots.calibration_figure,
    ),
    "agreement": Kind(
        "Agreement between models",
        (
            *(DATA, ("model", "first"), ("model", "second"), ("pairs", "pairs"), ("same choice %", "pair")),
            ("Spearman", partial(_correlation, name="spearman")),
            ("Pearson", partial(_correlation, name="pearson")),
        ),
        plots.agreement_figure,
    ),
    "correlations": Kind(
        "CLIP-Corr and Aes-Corr",
        (DATA, MODEL, ("name", "name"), ("against", "reference"), ("value", partial(_correlation, name="estimate"))),
    ),
}
"""List of results in :class:`BenchmarkReport` → section that shows it, with the text of that name."""


def sections(report: BenchmarkReport, pictures: Pictures | None = None) -> Iterator[Section]:
    """Yield all sections that are not empty, in the order of the report, with ``pictures`` of ``report.telling``."""
    if len(report.protocols) > 1:
        text = "Accuracy in %, with 95 % intervals. Protocols treat ties differently; each is explained below."
        rows = _side_by_side(report.protocols, "benchmark", "protocol")
        yield Section("Overview", text, [Table.of(rows, DATA, PROTOCOL, *map(_of_scorer, report.scorers))])
    published = grouped(report.published, "protocol")
    if report.averages:
        columns = (MODEL, ("mean accuracy %", ACCURACY[0][1]), ACCURACY[1])
        tables = [Table.of(report.averages, *columns, notes="Measured in this run"), _published(published[AVERAGE,])]
        yield Section("Mean of four benchmarks", TEXTS["four"] + PUBLISHED, tables)
    for (protocol, benchmark), rows in grouped(report.protocols, "protocol", "benchmark").items():
        theirs, summary = published.get((protocol,), []), PROTOCOLS[protocol].summary
        text = f"{summary[0].upper()}{summary[1:]}.{PUBLISHED if theirs else ''}"
        tables = [protocol_table(rows), *([_published(theirs)] if theirs else [])]
        known = any(math.isfinite(row["estimate"].value) for row in rows)
        yield Section(f"{benchmark}: {protocol}", text, tables, [plots.accuracy_figure(rows, theirs)] if known else [])
    for name, kind in KINDS.items():
        if rows := getattr(report, name):
            groups = grouped(rows, "benchmark", "protocol").values()
            figures = [kind.figure(same) for same in groups] if kind.figure else []
            yield Section(kind.title, TEXTS[name], [Table.of(rows, *kind.columns)], figures)
    if report.subgroups:
        tables = []
        by_column = grouped(report.subgroups, "benchmark", "protocol", "column")
        for (benchmark, protocol, column), results in by_column.items():
            scorers = map(_of_scorer, dict.fromkeys(result["scorer"] for result in results))
            rows, notes = _side_by_side(results, "value")[:LARGEST], f"{benchmark}: {protocol} by {column}"
            tables.append(Table.of(rows, (column, "value"), ("pairs", "pairs"), *scorers, notes=notes))
        yield Section("Sub-groups", TEXTS["subgroups"], tables)
    counts = Table.of(
        [{"benchmark": name, **counts} for name, counts in report.data.items()],
        DATA,
        ("pairs scored", lambda row: f"{row['pairs']} of {row['pairs_in_file']}"),
        *(("prompts", "prompts"), ("images", "images"), ("unreadable images", "unreadable_images")),
        *(("pairs without image", "pairs_without_an_image"), ("rows left out", "rows_left_out_by_the_reader")),
    )
    models = tuple((name, without_unset(identity)) for name, identity in report.scorers.items())
    settings = tuple((name, str(value)) for name, value in report.settings.items())
    yield Section("Data", TEXTS["scored"], [counts])
    yield Section("Models", TEXTS["models"], [Table(("model", "what it is"), models)])
    yield Section("Settings and versions", TEXTS["settings"], [Table(("setting", "value"), settings)])
    if report.telling:
        yield _telling(report, pictures or {})


def protocol_table(results: Sequence[Row]) -> Table:
    """Build the table of all models by one protocol."""
    return Table.of(
        results,
        *(MODEL, *ACCURACY, ("pairs", "pairs"), ("prompts", "groups"), ("equal scores", "equal_scores")),
        ("pairs left out", "excluded"),
        ("more", lambda row: _details(row["details"])),
        notes="Measured in this run",
    )


def _published(theirs: Sequence[Row]) -> Table:
    accuracy: Column = ("accuracy %", lambda row: percent(row["value"]))
    columns = ("model", "model"), accuracy, ("source", "source")
    return Table.of(theirs, *columns, notes="Published by others", theirs=True)


def _side_by_side(results: Sequence[Row], *keys: str) -> list[Row]:
    """Merge results that differ in scorer only: ``estimates`` by scorer, and ``pairs`` as in ``98/100``."""
    return [
        {
            **same[0],
            "pairs": "/".join(dict.fromkeys(str(one["pairs"]) for one in same)),
            "estimates": {one["scorer"]: one["estimate"] for one in same},
        }
        for same in grouped(results, *keys).values()
    ]


def _of_scorer(scorer: str) -> Column:
    return scorer, lambda row: cell(row["estimates"][scorer]) if scorer in row["estimates"] else NOTHING


def _telling(report: BenchmarkReport, pictures: Pictures) -> Section:
    several = len(report.scorers) > 1
    title = "Where the models disagree most" if several else "Surest mistakes"
    what = "two models prefer different images" if several else "the model prefers the wrong image"
    columns: tuple[Column, ...] = (
        ("pair", "pair_id"),
        ("prompt", lambda row: row["prompt"] if len(row["prompt"]) <= 120 else f"{row['prompt'][:119]}…"),
        ("people", lambda row: preferred(row["label"])),
        *(_gap(scorer) for scorer in report.scorers),
    )
    by_data = {name: pairs for (name,), pairs in grouped(report.telling, "benchmark").items()}
    tables = [Table.of(pairs, *columns, notes=name) for name, pairs in by_data.items()]
    cards = {name: [disagreement_card(pair, pictures) for pair in pairs] for name, pairs in by_data.items()}
    return Section(title, f"Pairs on which {what} by the largest gaps, {TEXTS['telling']}", tables, cards=cards)


def _gap(scorer: str) -> Column:
    return f"gap of {scorer}", lambda row: f"{row['gaps'][scorer]:+.2f}" if scorer in row["gaps"] else ""


def _details(details: Row) -> str:
    parts = []
    for name, value in details.items():
        if name == "draws":
            drawn = f"{value['number']} draws of noise"
            spread = f"{percent(value['mean'])} ± {percent(value['sd'])}"
            parts.append(f"{drawn}: {spread}" if value["sd"] else f"the same under {drawn}")
        elif name == "axes":
            parts += [f"{axis} alone {percent(accuracy)}" for axis, accuracy in value.items()]
        elif name == "temperature":
            parts.append(f"temperature {temperature(value)}")
        elif isinstance(value, (str, int)):
            parts.append(f"{name.replace('_', ' ')} {value}")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "; ".join(parts) or NOTHING
