"""The report in words: what each part shows and how it was computed, with its tables."""

from collections.abc import Iterator

from latentreward.evaluation.benchmark.four_benchmarks import KEY
from latentreward.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.evaluation.benchmark.results import BenchmarkReport, Disagreement
from latentreward.evaluation.benchmark.tables import (
    agreement_table,
    average_table,
    calibration_table,
    correlation_table,
    data_table,
    difference_table,
    level_table,
    overview_table,
    protocol_table,
    published_table,
    scorer_table,
    subgroup_tables,
)
from latentreward.reports.tables import Section, Table, grouped

INTRODUCTION = (
    "Each model scores two images of a prompt; it is right where it gives the higher score to the image that people "
    "preferred. An interval is the middle 95 % of what the number would be on other prompts of the same kind "
    "(bootstrap over prompts). Of few prompts it is too narrow: where pairs are of fewer than 30 groups, prompts as a "
    "rule, their number stands behind it, as (12 groups). Two models whose interval of the difference holds 0 are not "
    "told apart by this data."
)
OVERVIEW = "Accuracy in %, with 95 % intervals. Each protocol has its own idea of ties, told further down."
DATA = (
    "Pairs and images that were scored. An image that cannot be read takes its pairs out of every number; rows left "
    "out are those that break a rule of their file format."
)
SCORERS = "Models, with what fixes their numbers."
FOUR = (
    "Mean of four accuracies that weigh the same, however many pairs each data set has: ImageReward "
    "(imagereward/micro), HPDv2 (hpdv2/micro), HPDv3 (hpdv3) and TIGER-Lab's GenAI-Bench (genai_bench_tiger/no_tie), "
    "test splits. Intervals take the four for independent."
)
PUBLISHED = (
    " Numbers in italics are not of this run: others published them, see their source. Image sizes and precision may "
    "differ, and the same model measured by two code bases is usually a point apart."
)
DIFFERENCES = (
    "Accuracy of one model minus that of another on the pairs that count for both, in points, with the interval of the "
    "paired difference; it is narrower than the two intervals of the models suggest."
)
SUBGROUPS = (
    "Accuracy over parts of the pairs, in %, with 95 % intervals; the largest first, small ones of many in "
    "report.json alone. Some differ by chance: with twenty parts, expect one interval that misses its true value."
)
LEVELS = (
    "Latent rewards score images that were noised first. Here is their accuracy at each noise level alone (standard "
    "deviation of the noise in the mixture: 0 is the clean image, 1 nothing but noise), with 95 % intervals: where a "
    "reward is right says at which steps of a sampler it can be trusted."
)
CALIBRATION = (
    "Scores become win probabilities as σ(gap / temperature). A calibrated model is right 7 times in 10 where it says "
    "0.7: its curve lies on the diagonal. The error is the mean distance from it, weighed by pairs (10 bins), with "
    "temperatures that were fitted on other pairs."
)
AGREEMENT = (
    "How often two models prefer the same image of a pair, and the correlation of their scores over all images of the "
    "data set. Models that agree with each other more than with people share their mistakes."
)
CORRELATION = (
    "Agreement with a CLIP score (does the image show the prompt?) and with an aesthetic score (is it pretty?), by the "
    "names of the LRM paper (arXiv:2502.01051), which defines neither exactly: share of pairs with the same sign of "
    "gap, and rank and linear correlation over all images. Not comparable with the paper's figures."
)
TELLING = (
    "Pairs on which two models are most surely of opposite opinion, at most one per prompt. A gap is the score of the "
    "left image minus that of the right one, in units of the model's typical (root mean square) gap."
)
MISTAKES = (
    "Pairs on which the model is most surely wrong, at most one per prompt. A gap is the score of the left image minus "
    "that of the right one, in units of the model's typical (root mean square) gap."
)
SETTINGS = "What was asked for, and what computed it. Random draws are seeded: the same settings give the same report."


def sections(report: BenchmarkReport) -> Iterator[Section]:
    """All parts that hold something, in their order."""
    if len(report.protocols) > 1:
        yield Section("overview", "Overview", OVERVIEW, (overview_table(report),))
    if report.averages:
        theirs = [number for number in report.published if number.protocol == KEY]
        tables = average_table(report), published_table(theirs)
        yield Section("average", "Mean of four benchmarks", FOUR + PUBLISHED, tables)
    yield from _accuracy(report)
    if report.differences:
        yield Section("differences", "Differences between models", DIFFERENCES, (difference_table(report),))
    if report.levels:
        yield Section("levels", "Accuracy by noise level", LEVELS, (level_table(report),))
    if report.calibration:
        yield Section("calibration", "Calibration", CALIBRATION, (calibration_table(report),))
    if report.agreement:
        yield Section("agreement", "Agreement between models", AGREEMENT, (agreement_table(report),))
    if (table := correlation_table(report)).rows:
        yield Section("correlation", "CLIP-Corr and Aes-Corr", CORRELATION, (table,))
    if report.subgroups:
        yield Section("subgroups", "Sub-groups", SUBGROUPS, tuple(subgroup_tables(report)))
    yield Section("data", "Data", DATA, (data_table(report),))
    yield Section("models", "Models", SCORERS, (scorer_table(report),))
    settings = tuple((name, str(value)) for name, value in report.settings.items())
    yield Section("settings", "Settings and versions", SETTINGS, (Table(("setting", "value"), settings),))


def disagreement_section(report: BenchmarkReport) -> tuple[str, str, dict[str, list[Disagreement]]]:
    """Title, text, and the pairs by data set."""
    by_data = {name: pairs for (name,), pairs in grouped(report.telling, "benchmark").items()}
    if len(report.scorers) > 1:
        return "Where the models disagree most", TELLING, by_data
    return "Surest mistakes", MISTAKES, by_data


def preferred(label: float | None) -> str:
    """Which image people preferred, in words."""
    if label is None:
        return "no label"
    if label == 0.5:
        return "tie"
    side = "left" if label > 0.5 else "right"
    return side if label in (0, 1) else f"{side} ({max(label, 1 - label):.0%})"


def _accuracy(report: BenchmarkReport) -> Iterator[Section]:
    published = grouped(report.published, "protocol")
    for (protocol, benchmark), results in grouped(report.protocols, "protocol", "benchmark").items():
        theirs = published.get((protocol,), [])
        summary = PROTOCOLS[protocol].summary
        text = f"{summary[0].upper()}{summary[1:]}.{PUBLISHED if theirs else ''}"
        key = f"accuracy-{protocol}-{benchmark}"
        tables = protocol_table(results), *([published_table(theirs)] if theirs else [])
        yield Section(key, f"{benchmark}: {protocol}", text, tables)
