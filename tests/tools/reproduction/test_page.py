"""The committed pages are what the committed results give."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.tools.reproduction.test_rows import TOY
from tools.reproduction.answers import PLOT, Asked, Question, Unlisted, answers_page
from tools.reproduction.measuring import Values
from tools.reproduction.page import all_rows_listed, judge_rows, write_page
from tools.reproduction.results import SEEDS, Result, read_results, result_path, write_result
from tools.reproduction.rows import Row, all_rows, read_row
from tools.reproduction.verdicts import Word
from tools.reproduction.written import FILE

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
def test_the_committed_pages_are_what_the_results_give(tmp_path: Path) -> None:
    results = Path(shutil.copytree(ROOT / "reproduction", tmp_path / "reproduction"))
    write_page(tmp_path / "docs" / "reproduction.md", ROWS, results)
    for name in ("docs/reproduction.md", "reproduction/README.md"):
        committed, expected = ((folder / name).read_text() for folder in (ROOT, tmp_path))
        again = "run `python -m tools.reproduce --status --page docs/reproduction.md`"
        assert DECIMALS.sub("", committed) == DECIMALS.sub("", expected), again
        if np.lib.NumpyVersion(np.__version__) < "2.5.0":
            assert committed == expected, again
        ends = [np.array(DECIMALS.findall(text), float) for text in (committed, expected)]
        np.testing.assert_allclose(*ends, rtol=0, atol=0.003, err_msg=again)
    assert len((ROOT / "docs" / "reproduction.md").read_text().splitlines()) <= 120
    ElementTree.parse(tmp_path / "docs" / "images" / PLOT)


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
    found = {"toy": read_results(tmp_path / "results", row)}
    judged, asked = judge_rows([row], found), Asked((), Unlisted((), ()))
    text = all_rows_listed([row], found, judged, {}, asked)
    counts = ", ".join(f"{int(word.startswith(one))} {one}" for one in get_args(Word))
    assert f"**1 claims: {counts}.** 0 of the verdicts are single ones." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| one beats the other")]
    assert line.endswith(f"| {word} |")
    assert f"{len(means)} seeds with the same training pairs" in text
    assert f", 100 held-out items. Measured at commit `0123456789`, {10 * len(means)} s of processor time" in text
    question = Question("Is it?", "toy", "one beats the other", "+1", "Take it.")
    answers = {"holds": "yes", "does not hold": "no", "open; 6 more repetitions": "leans yes"}
    assert f"| Is it? (`toy`) | **{answers.get(word, 'unknown')}** |" in answers_page([question], [row], judged, "")
    assert "one beats the other" not in all_rows_listed([row], found, judged, {}, Asked((), Unlisted(("toy",), ())))


def test_the_readme_counts_the_claims_of_the_page() -> None:
    places = {"docs/reproduction.md": r"\d+ claims: .+?\*\*", "README.md": r"\d+ claims\].+?measured"}
    found = [re.findall(text, (ROOT / path).read_text(), re.DOTALL)[0] for path, text in places.items()]
    of_page, of_readme = (re.findall(r"\d+", text) for text in found)
    assert of_readme == of_page


def test_committed_claims_have_a_commit() -> None:
    commits = json.loads((ROOT / "reproduction" / FILE).read_text())
    assert {name for row in commits for name in commits[row]}
    assert commits.keys() <= {row.name for row in ROWS}
