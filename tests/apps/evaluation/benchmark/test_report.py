"""Reports: one content in three forms, the same bytes each time, and every text of others stays text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.evaluation.benchmark.base import BenchmarkPairs, BenchmarkReport
from latentreward.apps.evaluation.benchmark.sections import INTRODUCTION, TITLE, sections
from latentreward.apps.evaluation.benchmark.telling import Pictures, most_disputed
from latentreward.core.reports.drawing import picture_uri
from latentreward.core.reports.page import write_report
from tests.accessibility import PHONE, faults
from tests.apps.evaluation.benchmark.example import report

if TYPE_CHECKING:
    from tests.browser import Pages

FILES = ("report.json", "report.md", "report.html")
PICTURES: Pictures = {("hpdv3 test", 3): (Image.new("RGB", (200, 300), "teal"), None)}


def write(folder: Path, made: BenchmarkReport) -> None:
    write_report(folder, made, TITLE, INTRODUCTION, list(sections(made, PICTURES)), "benchmark")


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
    assert found["telling"][0]["scores"]["dina"] == [0.5, -1.25]


def test_a_pair_of_edits_shows_what_they_edit(tmp_path: Path) -> None:
    (key, (left, right)), edited = next(iter(PICTURES.items())), Image.new("RGB", (30, 20), "red")
    for name, sources in {"none": [], "two": [edited, None]}.items():
        made = list(sections(report(), {key: (left, right, *sources)}))
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report(), TITLE, INTRODUCTION, made, "benchmark")
        page = (tmp_path / name / "report.html").read_text()
        assert page.count("before the edit</figcaption>") == len(sources)
        assert page.count(f'<img src="{picture_uri(edited)}"') == len(sources) // 2


def test_names_and_prompts_are_no_markup_in_markdown(tmp_path: Path) -> None:
    write(tmp_path, report())
    text = (tmp_path / "report.md").read_text()
    for markup in ("<script>", "**bold**", "[a](", " $x_1$"):
        assert markup not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    (row,) = [line for line in tables if "| HPSv3 " in line]
    assert row.replace(r"\|", "").count("|") == 5


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_page_in_a_browser(tmp_path: Path, browser_page: "Pages", width: int, dark: bool) -> None:
    write(tmp_path, report())
    page = browser_page(tmp_path / "report.html", width=width, dark=dark)
    assert page.title() == "Benchmark of reward models"
    assert page.locator("script").count() == 0
    assert page.get_by_text("**bold**").count() > 0
    images = page.locator("img").all()
    assert len(images) == 2
    for image in images:
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        assert image.get_attribute("alt")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("section").count() == 13


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(tmp_path: Path, browser_page: "Pages", width: int, dark: bool) -> None:
    write(tmp_path, report())
    assert faults(browser_page(tmp_path / "report.html", width=width, dark=dark)) == []


def scored(name: str, gaps: list[float], labels: list[float], groups: str) -> BenchmarkPairs:
    ids = tuple(map(str, range(len(gaps))))
    first = np.array(gaps)
    return BenchmarkPairs(name, ids, ids, tuple(groups), np.array(labels), first, 0 * first)


def test_pairs_on_which_models_differ_most_come_first() -> None:
    labels = [1.0, 0.0, 1.0, 1.0, 0.5, 1.0]
    one = scored("one", [2.0, -1.0, 1.0, 3.0, -0.5, np.nan], labels, "abccde")
    other = scored("other", [20.0, 10.0, -20.0, -10.0, 5.0, 9.0], labels, "abccde")
    pairs = most_disputed([one, other], 10)
    assert [pair["row"] for pair in pairs] == [3, 1, 4]  # row 2 is of the prompt of row 3
    assert all(pair["gaps"]["one"] * pair["gaps"]["other"] < 0 for pair in pairs)
    assert most_disputed([one, other], 2) == pairs[:2]


def test_pairs_of_one_model_are_its_surest_mistakes() -> None:
    pairs = most_disputed([scored("one", [-1.0, 3.0, -2.0, 9.0, 4.0], [1.0, 0.0, 1.0, 1.0, 0.0], "abcdb")], 9)
    assert [pair["row"] for pair in pairs] == [4, 2, 0]
