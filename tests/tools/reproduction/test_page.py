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

from latentreward.errors import InputError
from tests.tools.reproduction.test_rows import TOY
from tools.reproduction.measuring import Values
from tools.reproduction.page import page, plot_name, write_page
from tools.reproduction.results import Result, read_results, result_path, write_result
from tools.reproduction.rows import Paper, Row, all_rows, read_row

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


@pytest.mark.slow
def test_the_committed_page_is_what_the_results_give() -> None:
    found = {row.name: list(read_results(ROOT / "reproduction", row).values()) for row in ROWS}
    expected = page(ROWS, found)
    again = "run `latentreward reproduce --status --page docs/reproduction.md`"
    committed = (ROOT / "docs" / "reproduction.md").read_text()
    assert DECIMALS.sub("", committed) == DECIMALS.sub("", expected), again
    if np.lib.NumpyVersion(np.__version__) < "2.5.0":
        assert committed == expected, again
    ends = [np.array(DECIMALS.findall(text), float) for text in (committed, expected)]
    np.testing.assert_allclose(*ends, rtol=0, atol=0.003, err_msg=again)


def test_committed_results_are_small_and_belong_to_rows() -> None:
    known = {result_path(ROOT / "reproduction", row, seed) for row in ROWS for seed in range(row.seeds)}
    files = set((ROOT / "reproduction").rglob("*.json"))
    assert files <= known
    assert all(path.stat().st_size < 40_000 for path in files)


@pytest.mark.parametrize(
    ("means", "word"),
    [
        ([(0.8, 0.5), (0.81, 0.5), (0.8, 0.51)], "holds"),
        ([(0.5, 0.8), (0.5, 0.81), (0.51, 0.8)], "does not hold"),
        ([(0.5, 0.5), (0.52, 0.5), (0.5, 0.52)], "undecided"),
        ([(0.8, 0.5)], "not measured"),
    ],
)
def test_a_row_on_the_page(means: list[tuple[float, float]], word: str, tmp_path: Path) -> None:
    row = read_row("toy", TOY)
    for seed, (one, other) in enumerate(means):
        write_result(result_path(tmp_path / "results", row, seed), result(row, seed, {"one": one, "other": other}))
    write_page(tmp_path / "docs" / "page.md", [row], tmp_path / "results")
    text = (tmp_path / "docs" / "page.md").read_text()
    assert f"**1 claims: {', '.join(f'{int(w == word)} {w}' for w in WORDS)}.**" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| one beats the other")]
    assert line.endswith(f"| {word} |")
    assert f"{len(means)} of 3 seeds, 100 held-out items, commit `0123456789`, {10 * len(means)} s" in text
    plot = tmp_path / "docs" / "images" / plot_name("LRM")
    assert plot.is_file() == (word != "not measured")
    if plot.is_file():
        assert f"images/{plot.name}" in text
        first = plot.read_bytes()
        ElementTree.fromstring(first)
        write_page(tmp_path / "docs" / "page.md", [row], tmp_path / "results")
        assert plot.read_bytes() == first


WORDS = ("holds", "does not hold", "undecided", "not measured")


def test_the_training_of_rewards_has_a_column() -> None:
    row = read_row("toy", {**TOY, "rewards": ["lrm"]})
    found = [result(row, seed, {"one": 0.8, "other": 0.5}) for seed in range(3)]
    for seed, one in enumerate(found):
        for arm, seconds in (("one", 100.0 + seed), ("other", 300.0)):
            one.tasks[row.task(arm, "lrm", seed).key[:16]] = seconds  # type: ignore[index]
    text = page([row], {"toy": found})
    assert "| mean ± sd over seeds | t 1 | training of rewards, s |" in text
    assert [line.split(" | ")[-1] for line in text.splitlines() if "±" in line and "0." in line] == ["101 |", "300 |"]
    assert "training of rewards" not in page([read_row("toy", TOY)], {"toy": found})


def test_claim_run_and_result_are_a_list() -> None:
    """The result is left out before the measurement."""
    texts = "- **Claim**: Ours: one beats the other.\n- **Run**: Two arms.\n"
    assert f"Row `toy`:\n\n{texts}\n" in page([read_row("toy", TOY)], {"toy": []})
    measured = read_row("toy", {**TOY, "result": "No difference could be shown."})
    assert f"{texts}- **Result**: No difference could be shown.\n\n" in page([measured], {"toy": []})


def test_a_row_without_results_is_named() -> None:
    assert "Not measured yet; expected processor time 1 s without shared steps." in page(
        [read_row("toy", TOY)], {"toy": []}
    )
    assert len({plot_name(paper) for paper in get_args(Paper)}) == len(get_args(Paper))


def test_sides_measured_on_different_items_are_refused() -> None:
    row = read_row("toy", TOY)
    found = [result(row, seed, {"one": 0.8, "other": 0.5}) for seed in range(3)]
    found[0].measured["one"]["t 1"]["items"] = "cd"  # type: ignore[index]
    with pytest.raises(InputError, match="compares different items"):
        page([row], {"toy": found})


def test_seeds_measured_on_different_items_are_refused() -> None:
    row = read_row("toy", TOY)
    found = [result(row, seed, {"one": 0.8, "other": 0.5}) for seed in range(3)]
    for arm in ("one", "other"):
        found[0].measured[arm]["t 1"]["items"] = "cd"  # type: ignore[index]
    with pytest.raises(InputError, match="its seeds were measured on different items"):
        page([row], {"toy": found})


@pytest.mark.parametrize("thousandths", ["", "AAA=", "?", 5])
def test_damaged_values_of_thousandths_are_one_line(thousandths: Any, tmp_path: Path) -> None:
    row = read_row("toy", TOY)
    packed = Values("ab", np.array([0.25, 1.5])).packed()
    measured = {arm: dict.fromkeys(row.metrics, packed) for arm in row.arms}
    whole = replace(result(row, 0, dict.fromkeys(row.arms, 0.5)), measured=measured)
    write_result(path := result_path(tmp_path, row, 0), whole)
    assert read_results(tmp_path, row) == {0: whole}
    path.write_text(path.read_text().replace(json.dumps(packed["thousandths"]), json.dumps(thousandths)))
    with pytest.raises(InputError, match=r"seed0.json is damaged.*; remove it to measure again"):
        read_results(tmp_path, row)


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
                {"number": 99},
                {"number": "<script>"},
                {"number": 100.0},
                {"bits": "?"},
                {"bits": "", "number": 0},
                {"mean": math.nan},
                {"mean": "0.5"},
                {"mean": True},
                {"mean": 0.6},
                {"items": "<b>"},
                {"items": 5},
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
