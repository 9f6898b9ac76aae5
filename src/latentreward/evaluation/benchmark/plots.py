"""Figures of the report, each with a sentence of alternative text."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from latentreward.evaluation.benchmark.results import BenchmarkReport, ProtocolResult, PublishedNumber
from latentreward.reports.tables import few_groups, grouped, percent

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white."""
MARKERS = "osD^vPX"
THEIRS = "#767676"
GUESSING = {"genai_bench_tiger/4way": 25, "pickapic/pickscore": None}
"""Accuracy of guessing in per cent, by protocol; others have 50. None: PickScore's protocol has no single value."""
Drawn = tuple[Figure, str]
"""Figure and its alternative text."""


def accuracy_figure(results: Sequence[ProtocolResult], published: Sequence[PublishedNumber]) -> Drawn:
    """Draw the accuracies of this run with their intervals, and published accuracies below."""
    names = [_label(result.scorer) + few_groups(result.estimate) for result in results]
    names += [f"{_label(one.model, 28)} (published)" for one in published]
    figure, axes = _axes(6.4, 0.9 + 0.28 * len(names))
    for place, result in enumerate(results):
        estimate = result.estimate
        axes.plot([100 * estimate.low, 100 * estimate.high], [place] * 2, color=COLOURS[0], linewidth=2)
        axes.plot(100 * estimate.value, place, "o", color=COLOURS[0])
    for place, one in enumerate(published, start=len(results)):
        axes.plot(100 * one.value, place, "D", color=THEIRS, fillstyle="none")
    guess = GUESSING.get(results[0].protocol, 50)
    if guess is not None:
        axes.axvline(guess, color=THEIRS, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"accuracy in %{'' if guess is None else ' (dotted: guessing)'}; lines are 95 % intervals")
    accuracies = ", ".join(f"{result.scorer} {percent(result.estimate.value)} %" for result in results)
    return (
        figure,
        f"Accuracy on {results[0].benchmark} by {results[0].protocol}: {accuracies}. The table below has all numbers.",
    )


def level_figures(report: BenchmarkReport) -> Iterator[Drawn]:
    """Draw accuracy over the noise level, one figure per data set and protocol."""
    for (benchmark, protocol), results in grouped(report.levels, "benchmark", "protocol").items():
        labels = {"xlabel": "noise level (0 clean, 1 noise)", "ylabel": "accuracy in %"}
        figure, axes = _axes(6.4, 3.6, f"{benchmark}: {protocol}", **labels, xlim=(0, 1))
        for number, ((scorer,), unsorted) in enumerate(grouped(results, "scorer").items()):
            levels = sorted(unsorted, key=lambda level: level.sigma)
            sigmas = [level.sigma for level in levels]
            lows, highs = ([100 * getattr(level.estimate, end) for level in levels] for end in ("low", "high"))
            axes.fill_between(sigmas, lows, highs, color=_style(number)["color"], alpha=0.15, linewidth=0)
            values = [100 * level.estimate.value for level in levels]
            axes.plot(sigmas, values, label=_label(scorer), **_style(number))
        axes.axhline(50, color=THEIRS, linewidth=0.8, linestyle=":")
        axes.legend(frameon=False)
        yield figure, f"Accuracy on {benchmark} over the noise level, with 95 % bands; the table below has all numbers."


def calibration_figures(report: BenchmarkReport) -> Iterator[Drawn]:
    """Draw reliability curves, one figure per data set and protocol."""
    for (benchmark, protocol), results in grouped(report.calibration, "benchmark", "protocol").items():
        labels = {"xlabel": "how sure the model is, in %", "ylabel": "how often it is right, in %"}
        figure, axes = _axes(4.6, 4.2, f"{benchmark}: {protocol}", **labels, xlim=(49, 101), ylim=(-2, 102))
        axes.plot([50, 100], [50, 100], color=THEIRS, linewidth=0.8, linestyle=":")
        for number, result in enumerate(results):
            places = [(100 * confidence, 100 * outcome) for _, confidence, outcome in result.curve]
            label = f"{_label(result.scorer)}: {percent(result.error.value)} %"
            axes.plot(*zip(*places, strict=True), label=label, **_style(number))
        axes.legend(frameon=False, title="calibration error", loc="lower right")
        yield figure, f"Reliability curves on {benchmark}; on the dotted diagonal a model is right as often as it says."


def agreement_figures(report: BenchmarkReport) -> Iterator[Drawn]:
    """Draw a matrix of the shares of pairs on which two models agree, one figure per data set and split."""
    for (name,), results in grouped(report.agreement, "benchmark").items():
        scorers = list(dict.fromkeys([one for result in results for one in (result.first, result.second)]))
        shares = {frozenset((result.first, result.second)): 100 * result.pair.value for result in results}
        figure, axes = _axes(1.8 + 0.8 * len(scorers), 1.2 + 0.6 * len(scorers), name)
        matrix = [[shares.get(frozenset((a, b)), 100.0 if a == b else float("nan")) for a in scorers] for b in scorers]
        axes.imshow(matrix, vmin=50, vmax=100, cmap="Blues")
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                colour = "white" if value > 80 else "black"
                axes.text(column, row, percent(value / 100), ha="center", va="center", color=colour)
        axes.set_xticks(range(len(scorers)), list(map(_label, scorers)), rotation=30, ha="right")
        axes.set_yticks(range(len(scorers)), list(map(_label, scorers)))
        yield figure, f"Share of pairs of {name} on which two models prefer the same image; the table has all numbers."


def _axes(width: float, height: float, title: str = "", **properties: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=_label(title, 60), **properties)
    return figure, axes


def _label(text: str, length: int = 40) -> str:
    """Shorten a name, and escape ``$`` so that matplotlib does not read the name as a formula."""
    short = text if len(text) <= length else f"{text[: length - 1]}…"
    return short.replace("$", r"\$")


def _style(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
