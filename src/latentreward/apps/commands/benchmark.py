"""``latentreward benchmark``: evaluate reward models by published protocols and write a report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentreward.apps.evaluation.benchmark.base import Benchmark
from latentreward.apps.evaluation.benchmark.evaluate import evaluate
from latentreward.apps.evaluation.benchmark.pair_scores import NoiseColumns, complete, open_scores
from latentreward.apps.evaluation.benchmark.sections import INTRODUCTION, TITLE, sections
from latentreward.apps.evaluation.benchmark.sets import recognise_benchmark
from latentreward.apps.evaluation.results import result_table
from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.reports.page import HTML, JSON, MARKDOWN, versions, write_report
from latentreward.core.reports.tables import as_text, cell
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import check_writable
from latentreward.reward import RewardModelScorer, Scorer
from latentreward.reward.scorers.reward_model import reward_names

LEVELS = (0.1, 0.2, 0.4, 0.6, 0.8)
"""Default noise levels, in [0, 1], at which latent rewards are evaluated one by one."""
PRINTED = ("benchmark", "protocol", "scorer", "estimate", "pairs")
"""Names of the values of each result that the terminal shows."""


def run(command: str, arguments: Sequence[str]) -> None:
    """Run ``latentreward benchmark OUTPUT_DIR ...``."""
    rest, paths, left = list[str](), list[str](), iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        if option == "--model":
            paths.append(value if equals else next(left, ""))
        else:
            rest.append(argument)
    # Of several --model PATH, the parser would keep the last one only.
    together = [*rest, f"--model={json.dumps(paths)}"] if len(paths) > 1 else arguments
    run_function(benchmark, command, together)


def benchmark(
    output_dir: Path,
    benchmarks: list[Benchmark] | None = None,
    scorers: list[Scorer] | None = None,
    *,
    data: PathText | None = None,
    model: list[PathText] | PathText | None = None,
    levels: Sequence[float] = LEVELS,
    limit: int | None = None,
    flush_every: int = 256,
    trust_remote_code: bool = False,
) -> None:
    """Score pairs of images that people judged, and report how often each model prefers the image people preferred.

    OUTPUT_DIR gets ``report.html``, ``report.md`` and ``report.json``, and the folder ``scores`` with a table for each
    split and model. The same command resumes a stopped run; if a model is added later, only that model is run. Pairs
    with an image that cannot be read are left out of the numbers and counted.

    Args:
        output_dir: Folder for the report and the scores.
        benchmarks: Data sets with their protocols, e.g. latentreward.apps.evaluation.benchmark.HPDv3Benchmark.
        scorers: Models to compare, with distinct names, e.g. latentreward.reward.RewardModelScorer.
        data: Folder or file of one more data set, whose format is detected.
        model: One or several more reward models, given like the path of RewardModelScorer. Each is named after its
            run or folder; ``--model A --model B`` compares two.
        levels: Noise levels in [0, 1]; latent rewards are also evaluated at each single level. ``[]`` for none.
        limit: Number of pairs to score at the start of each split, for a first look; all by default. The report says
            that a limit was set.
        flush_every: Pairs per part of a table: a killed process loses at most one part; Ctrl-C loses no scored pair.
        trust_remote_code: Whether to import classes that the settings of ``model`` name and that are not registered;
            importing runs their code. Each of ``scorers`` has its own setting of this name.
    """
    check_at_least_one(limit=limit)
    check_writable(output_dir / JSON)
    sets = _with_more("benchmarks", "data", benchmarks, [] if data is None else [recognise_benchmark(data)])
    paths = [model] if isinstance(model, str) else list(dict.fromkeys(model or []))
    named = zip(paths, reward_names(paths), strict=True)
    rewards = [RewardModelScorer(path, name, trust_remote_code=trust_remote_code) for path, name in named]
    given = _with_more("scorers", "model", scorers, rewards)
    models = [NoiseColumns(one, levels) if isinstance(one, RewardModelScorer) else one for one in given]
    scored = open_scores(output_dir / "scores", sets, models, limit, flush_every)
    complete(scored)
    report = evaluate(scored)
    report.settings = {
        "data sets": ", ".join(one.name for one in sets),
        "pairs per split": "all" if limit is None else f"the first {limit}",
        "noise levels": ", ".join(f"{level:g}" for level in levels) or "none",
        **{f"version of {name}": number for name, number in versions().items()},
    }
    if limit is not None:
        report.notes.append(
            f"A first look: only the first {limit} pairs of each split were scored. Do not quote these numbers."
        )
    write_report(output_dir, report, TITLE, INTRODUCTION, list(sections(report)))
    left_out = [
        f"{name}: {pairs} {'pair' if pairs == 1 else 'pairs'} left out: {cell(counts['unreadable_images'])}"
        for name, counts in report.data.items()
        if (pairs := counts["pairs_without_an_image"])
    ]
    notes = (f"note: {note}" for note in report.notes)
    rows = [{name: row[name] for name in PRINTED} for row in report.protocols]
    print(*notes, *left_out, as_text(result_table(rows)), sep="\n")
    print(f"{output_dir / HTML}, {MARKDOWN} and {JSON} show everything")


def _with_more(name: str, single: str, several: list[Any] | None, more: Sequence[Any]) -> list[Any]:
    found = [*(several or []), *more]
    if not found:
        raise InputError(f"{name}: there are none; give --{single}=FOLDER, or a --config file with {name}")
    names = [item.name for item in found]
    if repeated := [item for item in names if names.count(item) > 1]:
        raise InputError(f"{name}: two are named {repeated[0]!r}; give each a name of its own")
    return found
