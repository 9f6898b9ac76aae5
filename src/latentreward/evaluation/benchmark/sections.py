"""Sections of the report: for each, a text that explains what was computed and how, and its tables."""

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
    "Each model scores two images of a prompt. The model is right if it gives the higher score to the image that "
    "people preferred. Intervals are 95 % bootstrap intervals: they say how far a number would vary with other prompts "
    "of the same kind. Where all prompts have the same share of right answers, the interval is Wilson's, because a "
    "bootstrap has no width. With few prompts an interval is too narrow; if the pairs come from fewer than 30 groups "
    "(as a rule, a group is a prompt), the number of groups follows the interval, as in (12 groups). If the interval "
    "of the difference of two models contains 0, this data does not show which model is better."
)
OVERVIEW = "Accuracy in %, with 95 % intervals. Protocols treat ties differently; each is explained below."
DATA = (
    "Pairs and images that were scored. Pairs with an image that cannot be read are left out of every number. Rows "
    "left out are rows that break a rule of their file format."
)
SCORERS = "Models, with the files and settings that determine their scores."
FOUR = (
    "Unweighted mean of the accuracies on four test splits: ImageReward (imagereward/micro), HPDv2 (hpdv2/micro), "
    "HPDv3 (hpdv3) and TIGER-Lab's GenAI-Bench (genai_bench_tiger/no_tie). Intervals assume that the four accuracies "
    "are independent."
)
PUBLISHED = (
    " Numbers in italics were not measured in this run but published by others, see the column source. Image sizes and "
    "precision may differ; the same model measured by two code bases usually differs by about one percentage point."
)
DIFFERENCES = (
    "Accuracy of one model minus that of another on the pairs that count for both, in percentage points, with the "
    "interval of the paired difference. This interval is usually narrower than the models' own intervals suggest."
)
SUBGROUPS = (
    "Accuracy on sub-groups of the pairs, in %, with 95 % intervals. The largest sub-groups come first; tables show at "
    "most 25, report.json holds all. Some sub-groups differ by chance: of twenty intervals, expect one that misses the "
    "true value."
)
LEVELS = (
    "Latent rewards score images to which noise was added. This section shows their accuracy at single noise levels "
    "(standard deviation of the noise in the mixture: 0 is the clean image, 1 is pure noise), with 95 % intervals. A "
    "reward can be trusted at those steps of a sampler whose noise levels it judges accurately."
)
CALIBRATION = (
    "Scores become win probabilities as σ(gap / temperature). A calibrated model is right 7 times in 10 where it says "
    "0.7, so its curve lies on the diagonal. The calibration error is the mean distance of the curve from the diagonal "
    "(10 bins, weighted by pairs), with temperatures that were fitted on other pairs."
)
AGREEMENT = (
    "How often two models prefer the same image of a pair, and the correlation of their scores over all images of the "
    "data set. Models that agree with each other more than with people share their mistakes."
)
CORRELATION = (
    "Agreement of a reward with a CLIP score (does the image show the prompt?) and with an aesthetic score (is the "
    "image pretty?): share of pairs whose two gaps have the same sign, and rank and linear correlation over all "
    "images. The names are those of the LRM paper (arXiv:2502.01051), which does not define the numbers exactly, so "
    "they cannot be compared with the paper's figures."
)
TELLING = (
    "Pairs on which two models prefer different images by the largest gaps, at most one pair per prompt. A gap is the "
    "score of the left image minus that of the right image, in units of the model's root mean square gap."
)
MISTAKES = (
    "Pairs on which the model prefers the wrong image by the largest gaps, at most one pair per prompt. A gap is the "
    "score of the left image minus that of the right image, in units of the model's root mean square gap."
)
SETTINGS = (
    "Settings of the run, and versions of the packages that computed it. Random numbers are seeded: the same settings "
    "give the same report."
)


def sections(report: BenchmarkReport) -> Iterator[Section]:
    """Yield all sections that are not empty, in the order of the report."""
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
    """Return title, text, and the pairs of ``report.telling`` by data set and split."""
    by_data = {name: pairs for (name,), pairs in grouped(report.telling, "benchmark").items()}
    if len(report.scorers) > 1:
        return "Where the models disagree most", TELLING, by_data
    return "Surest mistakes", MISTAKES, by_data


def preferred(label: float | None) -> str:
    """Return in words which image people preferred; ``label`` is the probability of the left image."""
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
