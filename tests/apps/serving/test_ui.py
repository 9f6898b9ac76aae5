"""The page to try a reward model by hand."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentreward.apps.commands import ui as command
from latentreward.apps.serving.ui import LEVELS, TITLE, score_sheet
from latentreward.cli import main
from latentreward.errors import InputError
from latentreward.scoring.scoring_noise import ScoringNoise
from tests.accessibility import faults
from tests.apps.serving.processes import forked_server
from tests.apps.serving.servers import tiny_reward
from tests.rewards.stored import write_run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("red $x_1$.png", "blue.png")]
    for path, color in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (24, 24), color).save(path)
    return paths


def test_images_are_listed_by_score_and_drawn_over_noise(pictures: list[Path]) -> None:
    rows, figure = score_sheet(tiny_reward(), "a cat", pictures)
    scores = tiny_reward().score("a cat", pictures).tolist()
    assert [row[1] for row in rows] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    assert {row[0] for row in rows} == {"red $x_1$.png", "blue.png"} and rows[0][2:] == [None, None]
    lines = figure.axes[0].get_lines()
    at_02 = tiny_reward().score("a cat", pictures[:1], noise=ScoringNoise(sigmas=(0.2,)))
    assert lines[0].get_ydata()[LEVELS.index(0.2)] == pytest.approx(at_02.item(), abs=2e-5)
    figure.canvas.draw()  # the name holds no formula


def test_no_image_and_a_damaged_one_are_said(pictures: list[Path]) -> None:
    with pytest.raises(InputError, match="0 images"):
        score_sheet(tiny_reward(), "a cat", [])
    pictures[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="unknown image format"):
        score_sheet(tiny_reward(), "a cat", pictures)


def test_a_missing_extra_names_its_cure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["ui", "model"])
    assert "pip install 'latentreward[ui]'" in capsys.readouterr().err


@pytest.mark.browser
def test_the_page_scores_in_a_browser_and_asks_nobody_else(
    browser_page: Any, pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="extra ui: Gradio pins an older Pillow than the tests run with")
    write_run(tmp_path / "run", "dina", "sd35", lora={"rank": 2})
    with forked_server("ui", str(tmp_path / "run"), "--port=0") as server:
        page = browser_page(server.address)
        page.get_by_role("heading", name=TITLE).wait_for()
        assert page.title() == TITLE
        page.get_by_label("Prompt").fill("<b>a cat</b>")
        page.locator("input[type=file][multiple]").set_input_files(pictures)
        page.get_by_role("button", name="Score", exact=True).click()
        page.get_by_text("blue.png").first.wait_for(timeout=300_000)
        page.locator("[data-testid=matplotlib] img").wait_for(timeout=300_000)
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "page.png", full_page=True)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_keyboard_contrast_and_width(browser_page: Any, tmp_path: Path, width: int, dark: bool) -> None:
    pytest.importorskip("gradio", reason="extra ui: Gradio pins an older Pillow than the tests run with")
    write_run(tmp_path / "run", "dina", "sd35", lora={"rank": 2})
    with forked_server("ui", str(tmp_path / "run"), "--port=0") as server:
        page = browser_page(server.address, width=width, dark=dark)
        page.get_by_role("button", name="Score", exact=True).wait_for()
        page.get_by_text("- or -").first.wait_for()  # the last part that Gradio draws
        assert faults(page) == []
