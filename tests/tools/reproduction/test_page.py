"""The committed page is what the committed results give."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from latentreward.core.errors import InputError
from tests.tools.reproduction.test_rows import TOY
from tools.reproduction.measuring import Values
from tools.reproduction.page import judge_rows, page, plot_name, write_page
from tools.reproduction.results import SEEDS, Result, read_results, result_path, write_result
from tools.reproduction.rows import Row, all_rows, read_row
from tools.reproduction.verdicts import Word
from tools.reproduction.written import FILE, LATE, in_full, read_commits

ROOT = Path(__file__).resolve().parents[3]
ROWS = list(all_rows().values())
DECIMALS = re.compile(r"[+-]?\d\.\d{3}\b")
"""Numbers with three decimals. Ends of intervals vary with NumPy's release: ``multinomial`` of 2.5 draws otherwise."""


def result(row: Row, seed: int, means: dict[str, float]) -> Result:
    """A result whose arms rank a share of 100 pairs right."""
    values = {arm: Values("ab", (np.arange(100) < 100 * mean).astype(float)).packed() for arm, mean in means.items()}
    measured = {arm: dict.fromkeys(row.metrics, packed) for arm, packed in values.items()}
    facts = {"source": "s", "modules": {"": "latentreward"}, "commit": "0123456789", "machine": {}, "versions": {}}
    return Result(config=row.config_digest(seed), measured=measured, tasks={f"t{seed}": 10.0}, **facts)


def page_of(row: Row, *results: Result) -> str:
    """The page of one row, whose results are those of the seeds from 0 on."""
    found = {row.name: dict(enumerate(results))}
    return page([row], found, judge_rows([row], found), {})


@pytest.mark.slow
def test_the_committed_page_is_what_the_results_give() -> None:
    found = {row.name: read_results(ROOT / "reproduction", row) for row in ROWS}
    expected = page(ROWS, found, judge_rows(ROWS, found), read_commits(ROOT / "reproduction"))
    again = "run `python -m tools.reproduce --status --page docs/reproduction.md`"
    committed = (ROOT / "docs" / "reproduction.md").read_text()
    assert DECIMALS.sub("", committed) == DECIMALS.sub("", expected), again
    if np.lib.NumpyVersion(np.__version__) < "2.5.0":
        assert committed == expected, again
    ends = [np.array(DECIMALS.findall(text), float) for text in (committed, expected)]
    np.testing.assert_allclose(*ends, rtol=0, atol=0.003, err_msg=again)


def test_committed_results_are_small_and_belong_to_rows() -> None:
    known = {result_path(ROOT / "reproduction", row, seed) for row in ROWS for seed in SEEDS}
    files = set((ROOT / "reproduction").rglob("seed*.json"))
    assert files <= known
    assert all(path.stat().st_size < 40_000 for path in files)


@pytest.mark.parametrize(
    ("means", "word"),
    [
        ([(0.8, 0.5), (0.81, 0.5), (0.8, 0.51)], "holds"),
        ([(0.5, 0.8), (0.5, 0.81), (0.51, 0.8)], "does not hold"),
        ([(0.5, 0.5), (0.9, 0.5), (0.5, 0.9)], "open; more than 100 repetitions, or more items"),
        ([(0.6, 0.5), (0.7, 0.5), (0.8, 0.5)], "open; 6 more repetitions"),
        ([(0.8, 0.5)], "not measured"),
    ],
)
def test_a_row_on_the_page(means: list[tuple[float, float]], word: str, tmp_path: Path) -> None:
    row = read_row("toy", TOY)
    for seed, (one, other) in enumerate(means):
        write_result(result_path(tmp_path / "results", row, seed), result(row, seed, {"one": one, "other": other}))
    write_page(tmp_path / "docs" / "page.md", [row], tmp_path / "results")
    text = (tmp_path / "docs" / "page.md").read_text()
    counts = ", ".join(f"{int(word.startswith(one))} {one}" for one in get_args(Word))
    assert f"**1 claims: {counts}.** 0 of the verdicts are single ones." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| one beats the other")]
    assert line.endswith(f"| {word} |")
    assert f"{len(means)} seeds with the same training pairs" in text
    assert f", 100 held-out items. Measured at commit `0123456789`, {10 * len(means)} s of processor time" in text
    plot = tmp_path / "docs" / "images" / plot_name("LRM")
    assert plot.is_file() == (word != "not measured")
    if plot.is_file():
        assert f"images/{plot.name}" in text
        first = plot.read_bytes()
        ElementTree.fromstring(first)
        write_page(tmp_path / "docs" / "page.md", [row], tmp_path / "results")
        assert plot.read_bytes() == first


def test_claims_of_the_headlines_lead_the_page() -> None:
    row = read_row("toy", {**TOY, "claims": [{**TOY["claims"][0], "headline": "one or other"}]})
    text = page_of(row, *[result(row, seed, {"one": 0.8 + seed / 100, "other": 0.5}) for seed in range(3)])
    assert text.index("## Headline claims") < text.index("| one or other | one beats the other | +0.310 ")
    assert text.index("| one or other |") < text.index("## LRM")
    assert "Headline" not in page_of(read_row("toy", TOY))


@pytest.mark.parametrize(
    ("there", "verdict"),
    [
        ([(0.8, 0.5), (0.81, 0.5), (0.8, 0.51)], "holds"),
        ([(0.5, 0.8), (0.5, 0.81), (0.51, 0.8)], "does not hold; holds in one world alone"),
        ([(0.6, 0.5), (0.7, 0.5), (0.8, 0.5)], "open; 6 more repetitions; holds in one world alone"),
        ([], "not measured"),
    ],
)
def test_a_headline_claim_has_its_verdict_in_the_second_world(there: list[tuple[float, float]], verdict: str) -> None:
    row = read_row("toy", {**TOY, "claims": [{**TOY["claims"][0], "headline": "one or other"}]})
    second = replace(row, name="emoji_toy", paper="Second world", world="emoji", like="toy")
    worlds = {"toy": [(0.8, 0.5), (0.81, 0.5), (0.8, 0.51)], "emoji_toy": there}
    found = {
        name: {seed: result(row, seed, {"one": one, "other": other}) for seed, (one, other) in enumerate(means)}
        for name, means in worlds.items()
    }
    text = page([row, second], found, judge_rows([row, second], found), {})
    (line,) = [line for line in text.splitlines() if line.startswith("| one or other |")]
    assert line.endswith(f"| holds | {verdict} | toy |")


def test_the_headlines_of_both_papers_are_claims_in_both_worlds() -> None:
    """Claims of the second world stand in the lines of the first world's."""
    claims = [
        (row.like or row.name, in_full(claim), row.world) for row in ROWS for claim in row.claims if claim.headline
    ]
    first = {(name, claim) for name, claim, world in claims if not world}
    assert {(name, claim) for name, claim, world in claims if world} <= first
    assert len({claim.headline for row in ROWS for claim in row.claims} - {""}) == 10


def test_the_readme_counts_the_claims_of_the_page() -> None:
    places = {"docs/reproduction.md": r"\d+ claims: .+?\*\*", "README.md": r"\d+ claims\].+?measured"}
    found = [re.findall(text, (ROOT / path).read_text(), re.DOTALL)[0] for path, text in places.items()]
    of_page, of_readme = (re.findall(r"\d+", text) for text in found)
    assert of_readme == of_page


def test_the_commits_of_claims_and_measurement_are_shown() -> None:
    row = read_row("toy", TOY)
    found = {"toy": {seed: result(row, seed, {"one": 0.8, "other": 0.5}) for seed in range(3)}}
    commits = {"toy": {"one beats the other: one (t 1) > other": "abcdef0123"}}
    text = page([row], found, judge_rows([row], found), commits)
    assert "Claims written at commit `abcdef0123`. Measured at commit `0123456789`" in text
    assert "(late)" not in text.partition("Headline")[2] + text.partition("Row `toy`")[2]
    late = page([row], found, judge_rows([row], found), {"toy": dict.fromkeys(commits["toy"], "abcdef0123" + LATE)})
    assert late == text.replace("or more items |", "or more items (late) |")


def test_committed_claims_have_a_commit() -> None:
    commits = json.loads((ROOT / "reproduction" / FILE).read_text())
    assert {name for row in commits for name in commits[row]}
    assert commits.keys() <= {row.name for row in ROWS}


def test_sides_measured_on_different_items_are_refused() -> None:
    row = read_row("toy", TOY)
    found = [result(row, seed, {"one": 0.8, "other": 0.5}) for seed in range(3)]
    found[0].measured["one"]["t 1"]["items"] = "cd"  # type: ignore[index]
    with pytest.raises(InputError, match="compares different items"):
        page_of(row, *found)


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content.pop("tasks"),
        lambda content: content.update(more=1),
        lambda content: content.update(measured={}),
        lambda content: content.update(tasks={"a": "b"}),
        lambda content: content.update(commit="` <script>"),
        lambda content: content.update(modules=["os"]),
        lambda content: content.update(tasks={"a": math.nan}),
        lambda content: content.update(tasks={"a": 10**400}),
        lambda content: content.update(tasks={"a": -1.0}),
        lambda content: content.update(measured={"<b>": content["measured"]["one"], **content["measured"]}),
        lambda content: content["measured"].update(more=[]),
        lambda content: content["measured"]["one"].update({"<b>": content["measured"]["one"]["t 1"]}),
        lambda content: content["measured"].update(one=[]),
        *(
            lambda content, entries=entries: content["measured"]["one"]["t 1"].update(entries)
            for entries in (
                {"number": 10**12},
                {"number": "<script>"},
                {"bits": "?"},
                {"bits": "", "number": 0},
                {"mean": math.nan},
                {"mean": "0.5"},
                {"mean": 0.6},
                {"items": "<b>"},
            )
        ),
    ],
)
def test_a_damaged_result_is_one_line(harm: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    row = read_row("toy", TOY)
    write_result(path := result_path(tmp_path, row, 0), result(row, 0, dict.fromkeys(row.arms, 0.5)))
    assert read_results(tmp_path, row)
    harm(content := json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"seed0.json is damaged.*; remove it to measure again"):
        read_results(tmp_path, row)
