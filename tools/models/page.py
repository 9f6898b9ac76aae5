"""Table of models at full size, written from the results of pilots: ``python -m tools.models.page``."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import yaml

from latentreward.apps.evaluation.benchmark.published_numbers import AVERAGE, FOUR_BENCHMARKS, PUBLISHED
from latentreward.apps.pilot.plans import BESIDE, Pilot, all_pilots
from latentreward.apps.pilot.results import PilotResult, read_result
from latentreward.errors import InputError
from latentreward.metrics.bootstrap import Interval
from latentreward.reports.tables import NOTHING, Table, markdown_table, percent, plain, with_interval
from latentreward.storage.durable import write_file

NOT_MEASURED = "not measured"
AGAIN = " (last of {starts} starts)"
HEADER = ("model", "weights", "trained on", "licence", "command", "measured")
TITLES = {"imagereward test": "ImageReward", "hpdv2 test": "HPDv2", "hpdv3 test": "HPDv3"}
TITLES["genai_bench_tiger test"] = "GenAI-Bench"
Runs = Sequence[tuple[int, PilotResult]]
"""Number from 1, and result, of each run of a pilot."""


def page(pilots: Iterable[Pilot], results: Sequence[PilotResult]) -> str:
    """Return the page as Markdown; equal pilots and results give equal text.

    Each of the ``pilots`` gets its rows whether or not it was run.
    """
    runs = [(pilot, [*enumerate((one for one in results if one.pilot == pilot.name), start=1)]) for pilot in pilots]
    weights = Table(HEADER, (*_published(results), *(row for pilot, found in runs for row in _trained(pilot, found))))
    parts = []
    for pilot, found in runs:
        parts += [f"### {plain(pilot.title)}", f"`latentreward pilot {pilot.name}`"]
        header = ("reward", *TITLES.values(), "mean", "trained on")
        parts.append(markdown_table(Table(header, tuple(_rewards(pilot, found)))))
        header = ("generator", "score", "before", "after", "difference [95 %]", "preferred, % [95 %]")
        parts.append(markdown_table(Table(header, tuple(_generators(pilot, found)))))
        header = ("run", "machine", "hours by stage", "peak GPU memory, GB", "versions", "commit", "settings")
        parts.append(markdown_table(Table(header, tuple(_runs(found) or [(NOT_MEASURED, *[NOTHING] * 6)]))))
    template = Template(Path(__file__).with_name("page.md").read_text(encoding="utf-8"))
    return template.substitute(weights=markdown_table(weights), pilots="\n\n".join(parts))


def _published(results: Sequence[PilotResult]) -> list[tuple[str, ...]]:
    """Return the rows of the weights in ``weights.yaml``."""
    run = {result.pilot: f"yes, by the runs of pilot {result.pilot} below" for result in results}
    rows = yaml.safe_load(Path(__file__).with_name("weights.yaml").read_text(encoding="utf-8"))
    columns = ("model", "weights", "data", "licence", "command")
    return [
        (*(row[name] for name in columns), row.get("measured", run.get(row.get("pilot"), NOT_MEASURED))) for row in rows
    ]


def _trained(pilot: Pilot, found: Runs) -> list[tuple[str, ...]]:
    """Return a row for each run of a pilot whose result names published weights."""
    return [
        (
            f"{pilot.reward}, run {number} below",
            result.weights,
            f"{result.cut['pairs']} pairs, as configs/pilot/{pilot.name}.yaml says",
            "see its model card",
            f"latentreward score pictures scores.csv --model {result.weights}",
            f"yes, as run {number} below",
        )
        for number, result in found
        if result.weights
    ]


def _rewards(pilot: Pilot, found: Runs) -> list[tuple[str, ...]]:
    rows = []
    for number, result in found:
        trained = f"{result.cut['pairs']} pairs, seed {result.settings['seed']}"
        rows.append((f"{pilot.reward}, run {number}", *_accuracies(result, "pilot"), trained))
        rows.append((f"published checkpoint, run {number}", *_accuracies(result, BESIDE), NOTHING))
    if not rows:
        rows = [(name, *[NOT_MEASURED] * 5, NOTHING) for name in (pilot.reward, "published checkpoint")]
    papers = {one["model"] for one in PUBLISHED} & {pilot.reward, f"{pilot.reward} (ensemble)"}
    if not papers:
        rows.append((f"{pilot.reward}, the paper", *["not published"] * 5, NOTHING))
    for model in sorted(papers):
        numbers = {(one["protocol"], one["model"]): one["value"] for one in PUBLISHED}
        keys = (*FOUR_BENCHMARKS.values(), AVERAGE)
        cells = [f"{100 * numbers[key, model]:.2f}" if (key, model) in numbers else NOTHING for key in keys]
        rows.append((f"{model}, the paper", *cells, "all of the training set"))
    return rows


def _accuracies(result: PilotResult, model: str) -> list[str]:
    measured = {(one["model"], one["benchmark"], one["protocol"]): one["estimate"] for one in result.accuracy}
    means = {one["model"]: one["estimate"] for one in result.averages}
    found = [measured.get((model, *place)) for place in FOUR_BENCHMARKS.items()]
    estimates = (*found, means.get(model))
    return [NOT_MEASURED if one is None else with_interval(Interval(**one), percent) for one in estimates]


def _generators(pilot: Pilot, found: Runs) -> list[tuple[str, ...]]:
    rows = [
        (
            f"{pilot.policy}, run {number}",
            one["score"],
            *(f"{one[name]['value']:.3f}" for name in ("before", "after")),
            with_interval(Interval(**one["difference"]), "{:+.3f}".format),
            with_interval(Interval(**one["win_rate"]), percent),
        )
        for number, result in found
        for one in result.pictures
    ]
    return rows or [(pilot.policy, *[NOT_MEASURED] * 5)]


def _runs(found: Runs) -> list[tuple[str, ...]]:
    return [
        (
            str(number),
            result.machine.get("gpu") or result.machine["processor"],
            ", ".join(
                f"{name} {one['seconds'] / 3600:.1f}{AGAIN.format(**one) if one['starts'] > 1 else ''}"
                for name, one in result.stages.items()
            ),
            f"{max(one['gpu_gb'] for one in result.stages.values()):.1f}",
            ", ".join(f"{name} {result.versions[name]}" for name in ("latentreward", "torch", "diffusers")),
            result.commit or NOTHING,
            result.settings["digest"][:8],
        )
        for number, result in found
    ]


def read_results(folder: Path) -> list[PilotResult]:
    """Read all results of a folder, in the order of their file names.

    Raises:
        InputError: As :func:`read_result`; or if a file is of a trial.
    """
    found = {path: read_result(path) for path in sorted(folder.glob("*.json"))}
    for path, result in found.items():
        if result.settings["quick"]:
            raise InputError(f"{path}: it is of a trial (--quick); give the result of a whole run")
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(prog="python -m tools.models.page", description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"), help="page to write")
    parser.add_argument("--results", type=Path, default=Path("pilots"), help="folder of the pilots' results")
    given = parser.parse_args(arguments)
    full = [pilot for pilot in all_pilots().values() if pilot.device == "gpu"]
    write_file(given.page, page(full, read_results(given.results)))
    print(f"{given.page} is written")


if __name__ == "__main__":
    main()
