"""The server's description as a page, in a browser."""

from pathlib import Path
from typing import Any

import pytest

from latentreward.serving.app import create_app
from latentreward.serving.resources import Resources
from latentreward.serving.routes import page_of
from latentreward.serving.served import ScoringService, ServedModel
from latentreward.serving.settings import ServiceSettings
from tests.accessibility import PHONE, faults
from tests.serving.servers import tiny_reward


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(tmp_path: Path, browser_page: Any, width: int, dark: bool) -> None:
    resources = Resources(ServiceSettings())
    service = ScoringService([ServedModel(tiny_reward(), resources, name="first")], resources)
    (tmp_path / "docs.html").write_text(page_of(create_app(service).openapi()), encoding="utf-8")
    assert faults(browser_page(tmp_path / "docs.html", width=width, dark=dark)) == []
