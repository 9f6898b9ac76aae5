"""Reports: one content in three forms, the same bytes each time, and every text of others stays text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentreward.apps.evaluation.benchmark.base import BenchmarkReport
from latentreward.apps.evaluation.benchmark.sections import INTRODUCTION, TITLE, sections
from latentreward.core.reports.page import write_report
from tests.accessibility import PHONE, faults
from tests.apps.evaluation.benchmark.example import report

if TYPE_CHECKING:
    from tests.browser import Pages

FILES = ("report.json", "report.md", "report.html")


def write(folder: Path, made: BenchmarkReport) -> None:
    write_report(folder, made, TITLE, INTRODUCTION, list(sections(made)))


@pytest.mark.slow
def test_same_results_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write(folder, report())
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(FILES)
    for name in FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_json_has_everything_and_nothing_that_json_does_not_know(tmp_path: Path) -> None:
    write(tmp_path, report())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert set(found) == set(BenchmarkReport.__dataclass_fields__)
    assert found["protocols"][1]["estimate"] == pytest.approx({"value": 0.65, "low": 0.6, "high": 0.7, "groups": 400})
    assert found["agreement"][1]["pearson"] == {"value": None, "low": None, "high": None, "groups": 400}


def test_names_and_prompts_are_no_markup_in_markdown(tmp_path: Path) -> None:
    write(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    for markup in ("<script>", "**bold**", "[a](", " $x_1$"):
        assert markup not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    (row,) = [line for line in tables if "| HPSv3 " in line]
    assert row.replace(r"\|", "").count("|") == 5


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(tmp_path: Path, browser_page: "Pages", width: int, dark: bool) -> None:
    write(tmp_path, report())
    assert faults(browser_page(tmp_path / "report.html", width=width, dark=dark)) == []
