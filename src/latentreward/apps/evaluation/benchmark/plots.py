"""Figures of the report, each with a sentence of alternative text."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from latentreward.core.reports.tables import Row, few_groups, grouped, percent

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white."""
MARKERS = "osD^vPX"
THEIRS = "#767676"
GUESSING = {"genai_bench_tiger/4way": 25, "pickapic/pickscore": None}
GUESSING |= dict.fromkeys(f"editreward_bench/{one}" for one in ("groups", 2, 3, 4))
"""Accuracy of guessing in per cent, by protocol; others have 50. None: it depends on the share of ties."""
Drawn = tuple[Figure, str]
"""Figure and its alternative text."""


def accuracy_figure(results: Sequence[Row], published: Sequence[Row]) -> Drawn:
    """Draw the accuracies of this run with their intervals, and published accuracies below."""
    names = [_label(row["scorer"]) + few_groups(row["estimate"]) for row in results]
    names += [f"{_label(row['model'], 28)} (published)" for row in published]
    figure, axes = _axes(6.4, 0.9 + 0.28 * len(names))
    for place, row in enumerate(results):
        value, low, high, _ = row["estimate"]
        axes.plot([100 * low, 100 * high], [place] * 2, color=COLOURS[0], linewidth=2)
        axes.plot(100 * value, place, "o", color=COLOURS[0])
    for place, row in enumerate(published, start=len(results)):
        axes.plot(100 * row["value"], place, "D", color=THEIRS, fillstyle="none")
    protocol, benchmark = results[0]["protocol"], results[0]["benchmark"]
    guess = GUESSING.get(protocol, 50)
    if guess is not None:
        axes.axvline(guess, color=THEIRS, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"accuracy in %{'' if guess is None else ' (dotted: guessing)'}; lines are 95 % intervals")
    accuracies = ", ".join(f"{row['scorer']} {percent(row['estimate'].value)} %" for row in results)
    return figure, f"Accuracy on {benchmark} by {protocol}: {accuracies}. The table below has all numbers."


def level_figure(results: Sequence[Row]) -> Drawn:
    """Draw accuracy over the noise level by one protocol on one data set."""
    benchmark = results[0]["benchmark"]
    labels = {"xlabel": "noise level (0 clean, 1 noise)", "ylabel": "accuracy in %"}
    figure, axes = _axes(6.4, 3.6, f"{benchmark}: {results[0]['protocol']}", **labels, xlim=(0, 1))
    for number, ((scorer,), unsorted) in enumerate(grouped(results, "scorer").items()):
        rows = sorted(unsorted, key=lambda row: row["sigma"])
        sigmas = [row["sigma"] for row in rows]
        values, lows, highs = ([100 * row["estimate"][end] for row in rows] for end in range(3))
        axes.fill_between(sigmas, lows, highs, color=_style(number)["color"], alpha=0.15, linewidth=0)
        axes.plot(sigmas, values, label=_label(scorer), **_style(number))
    axes.axhline(50, color=THEIRS, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False)
    return figure, f"Accuracy on {benchmark} over the noise level, with 95 % bands; the table below has all numbers."


def calibration_figure(results: Sequence[Row]) -> Drawn:
    """Draw reliability curves by one protocol on one data set."""
    benchmark = results[0]["benchmark"]
    labels = {"xlabel": "how sure the model is, in %", "ylabel": "how often it is right, in %"}
    title = f"{benchmark}: {results[0]['protocol']}"
    figure, axes = _axes(4.6, 4.2, title, **labels, xlim=(49, 101), ylim=(-2, 102))
    axes.plot([50, 100], [50, 100], color=THEIRS, linewidth=0.8, linestyle=":")
    for number, row in enumerate(results):
        places = [(100 * confidence, 100 * outcome) for _, confidence, outcome in row["curve"]]
        label = f"{_label(row['scorer'])}: {percent(row['error'].value)} %"
        axes.plot(*zip(*places, strict=True), label=label, **_style(number))
    axes.legend(frameon=False, title="calibration error", loc="lower right")
    return figure, f"Reliability curves on {benchmark}; on the dotted diagonal a model is right as often as it says."


def agreement_figure(results: Sequence[Row]) -> Drawn:
    """Draw a matrix of the shares of pairs of one data set on which two models agree."""
    benchmark = results[0]["benchmark"]
    scorers = list(dict.fromkeys(name for row in results for name in (row["first"], row["second"])))
    shares = {frozenset((row["first"], row["second"])): 100 * row["pair"].value for row in results}
    figure, axes = _axes(1.8 + 0.8 * len(scorers), 1.2 + 0.6 * len(scorers), benchmark)
    matrix = [[shares.get(frozenset((a, b)), 100.0 if a == b else float("nan")) for a in scorers] for b in scorers]
    axes.imshow(matrix, vmin=50, vmax=100, cmap="Blues")
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            colour = "white" if value > 80 else "black"
            axes.text(column, row, percent(value / 100), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(scorers)), list(map(_label, scorers)), rotation=30, ha="right")
    axes.set_yticks(range(len(scorers)), list(map(_label, scorers)))
    alternative = f"Share of pairs of {benchmark} on which two models prefer the same image; the table has all numbers."
    return figure, alternative


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
