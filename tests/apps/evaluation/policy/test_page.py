"""The page in a browser: pictures of both policies, order and filters, and hostile texts that stay texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentreward.apps.evaluation.policy.statistics import (
    INTRODUCTION,
    PolicyReport,
    ScoredPictures,
    compare,
    policy_scores,
    sections,
    side_by_side,
)
from latentreward.core.reports.page import write_report
from latentreward.reward.scorers.tools import JudgedPicture
from tests.accessibility import PHONE, faults

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1"> `| "\' & ü \u202e'
PROMPTS = ["a red circle", HOSTILE, "two blue crosses", "x" * 400]
FIRST, SECOND = np.array([0.1, 0.4, 0.3, 0.2]), np.array([0.3, 0.1, 0.3, 0.1])


def policy(folder: Path, name: str, scores: np.ndarray, groups: bool = True) -> ScoredPictures:
    pictures = []
    for place, prompt in enumerate(PROMPTS):
        path = folder / f"{name[0]}{place}.png"
        Image.fromarray(np.random.default_rng(place).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
        group = ("shapes", "<b>odd</b>")[place % 2] if groups else ""
        pictures.append(JudgedPicture(place, 0, path.name, path, prompt, group))
    return ScoredPictures(name, tuple(pictures), {"pickscore": scores, "aesthetic": -scores})


def write(folder: Path, *scored: ScoredPictures) -> Path:
    headlines = {"pickscore": "mean", "aesthetic": "mean"}
    report = PolicyReport(
        {one.policy: HOSTILE for one in scored},
        {"pickscore": HOSTILE, "aesthetic": "AestheticScorer"},
        [score for one in scored for score in policy_scores(one, headlines)],
        compare(scored[0], scored[1], headlines) if len(scored) > 1 else [],
        notes=(HOSTILE,),
    )
    title = " against ".join(report.policies)
    write_report(folder, report, title, INTRODUCTION, sections(report), "policy", **side_by_side(scored, 10))
    return folder / "report.html"


def shown(page: Any) -> list[str]:
    return [card.inner_text() for card in page.locator(".card:visible .prompt").all()]


@pytest.mark.browser
def test_two_policies_side_by_side(tmp_path: Path, browser_page: Any) -> None:
    page = browser_page(write(tmp_path, policy(tmp_path, "tuned", FIRST), policy(tmp_path, "base", SECOND)))
    assert page.title() == "tuned against base"
    assert page.locator(".card").count() == 4
    assert page.locator(".card img").count() == 8
    assert all(page.locator(".card img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    assert shown(page)[0].split()[0] == HOSTILE.split(maxsplit=1)[0]  # the greatest difference first, and still a text
    assert shown(page)[-1] == "a red circle"
    page.select_option("#direction", "1")
    assert shown(page)[0] == "a red circle"
    page.select_option("#direction", "0")
    assert shown(page)[2] == "two blue crosses"
    page.select_option("#by", "1")
    page.select_option("#direction", "-1")
    assert shown(page)[0] == "a red circle"
    page.select_option("#sign", "0")
    assert shown(page) == ["two blue crosses"]
    page.select_option("#sign", "-1")
    assert len(shown(page)) == 2
    page.select_option("#sign", "")
    page.select_option("#group", "1")
    assert sorted(shown(page)) == ["a red circle", "two blue crosses"]
    page.fill("#words", "BLUE")
    assert shown(page) == ["two blue crosses"]
    assert page.inner_text("#count") == "1 shown"
    assert page.locator("script").count() == 1


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(width: int, dark: bool, tmp_path: Path, browser_page: Any) -> None:
    report = write(tmp_path, policy(tmp_path, "tuned", FIRST), policy(tmp_path, "base", SECOND))
    assert faults(browser_page(report, width=width, dark=dark)) == []


def test_reports_keep_hostile_texts_as_texts(tmp_path: Path) -> None:
    write(tmp_path, policy(tmp_path, "tuned", FIRST), policy(tmp_path, "base", SECOND))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert '<script>document.title="owned"' not in html
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    assert all(len({line.replace("\\|", "").count("|") for line in table}) == 1 for table in tables)
