"""The accuracy on held-out pairs says how sure it is, and the page shows the pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from latentreward.apps.taste.pairs import collect
from latentreward.apps.taste.plan import PREFERENCES, Plan, write_pairs
from latentreward.apps.taste.results import BEFORE_AFTER, HTML, JSON, SCORES, Measured, measure, spread, write_result
from latentreward.apps.taste.splitting import PARTS, Split
from latentreward.core.bootstrap import Interval
from latentreward.core.errors import InputError
from tests.accessibility import PHONE, faults
from tests.apps.taste.folders import draw, sorted_folder


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    folder = sorted_folder(tmp_path / "mine", 40, prompts=4)
    pairs = list(collect(folder).pairs)
    parts = dict.fromkeys(PARTS, pairs)
    written = write_pairs(tmp_path / "work", Split(parts, "for a test"))
    return Plan("sd_tiny", folder, written, None, "frozen", None, False, None, [], [], 4)


def scored(plan: Plan, wrong: int, ties: int = 0) -> Path:
    """Scores at two levels, of which one alone would say the opposite, with so many wrong pairs and ties."""
    rows = [json.loads(line) for line in (plan.pairs / PREFERENCES).read_text().splitlines()]
    held = [row for row in rows if row["split"] == "held_out"]
    columns = {
        "pair_id": [],
        "chosen_key": [],
        "rejected_key": [],
        "label": [],
        "chosen_score": [],
        "rejected_score": [],
    }
    for level in (-1.0, 3.0):
        for number, row in enumerate(held):
            sign = -1 if number < wrong else 1
            values = (row["pair_id"], row["chosen"], row["rejected"], 0.5 if number >= len(held) - ties else 1.0)
            for name, value in zip(columns, (*values, sign * level + number / 100, number / 100), strict=True):
                columns[name].append(value)
    folder = plan.pairs.parent / "scores"
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / SCORES)
    return folder


def test_scores_are_means_over_levels_and_ties_do_not_count(plan: Plan) -> None:
    measured = measure(scored(plan, wrong=4, ties=8), plan.pairs)
    assert len(measured.pairs) == 32 and measured.accuracy.value == 28 / 32
    assert measured.accuracy.groups == 32
    assert [round(pair.margin, 6) for pair in measured.pairs] == [1.0] * 28 + [-1.0] * 4
    assert measured.learned and measured.verdict() == "The reward orders new pairs better than chance."
    assert measured.line().startswith("accuracy on 32 held-out pairs in %: 87.5 [")
    assert measured.line().endswith("(95 % interval; chance is 50 %)")
    fewer = replace(measured, accuracy=measured.accuracy._replace(groups=9))
    assert "by their common pictures the pairs count as 9 independent ones; chance" in fewer.line()


def test_too_little_is_said_in_one_line(plan: Plan) -> None:
    measured = measure(scored(plan, wrong=17), plan.pairs)
    assert not measured.learned and measured.accuracy.low < 0.5 < measured.accuracy.high
    assert measured.verdict().startswith("Too little to learn from: the interval includes 50 %")
    assert "\n" not in measured.verdict()
    worse = replace(measured, accuracy=Interval(0.2, 0.1, 0.3, 40))
    assert not worse.learned and worse.verdict().startswith("The reward orders new pairs worse than chance: ")
    with pytest.raises(InputError, match="folder: no held-out pair besides ties has a score; look for"):
        measure(scored(plan, wrong=0, ties=40), plan.pairs)


def test_the_page_holds_its_pictures_and_shows_names_as_text(plan: Plan) -> None:
    measured: Measured = measure(scored(plan, wrong=4), plan.pairs)
    measured.pairs[0] = replace(measured.pairs[0], prompt="<script>alert(1)</script>")
    gone = plan.folder / measured.pairs[-1].chosen
    gone.unlink()
    page = write_result(plan.pairs.parent, plan, measured, "by picture", None)
    text = page.read_text()
    assert page.name == HTML and text.count("data:image/jpeg") == 2 * 24 - 1 and "cannot be read now" in text
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "Before and after" not in text and "Own taste: mine" in text
    told = json.loads((page.parent / JSON).read_text())
    assert told["accuracy"]["value"] == 0.9 and told["learned"] and told["tuning"] == "frozen"
    assert [pair.margin for pair in spread(measured.pairs)][-1] == measured.pairs[-1].margin


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(plan: Plan, browser_page: Any, width: int, dark: bool) -> None:
    judged = plan.pairs.parent / "judged"
    for name in BEFORE_AFTER.values():
        draw(judged / "pictures" / name / "0.png", 1)
        (judged / "pictures" / name / "images.csv").write_text("file,prompt\n0.png,a prompt\n")
    change = {"value": 0.1, "low": -0.1, "high": 0.3}
    (judged / "report.json").write_text(json.dumps({"comparisons": [{"difference": change}]}))
    page = write_result(plan.pairs.parent, plan, measure(scored(plan, wrong=17), plan.pairs), "by picture", judged)
    assert "Before and after" in page.read_text()
    assert faults(browser_page(page, width=width, dark=dark)) == []
