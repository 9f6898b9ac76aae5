"""The server's description as a page, in a browser."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from latentreward.apps.serving.resources import Resources
from latentreward.apps.serving.served import ScoringService, ServedModel
from latentreward.apps.serving.settings import ServiceSettings
from tests.accessibility import PHONE, faults
from tests.apps.serving.servers import started, tiny_reward


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(PHONE, False), (1200, True)])
def test_keyboard_contrast_and_width(tmp_path: Path, browser_page: Any, width: int, dark: bool) -> None:
    resources = Resources(ServiceSettings())
    service = ScoringService([ServedModel(tiny_reward(), resources, name="first")], resources)
    with started(service) as address:
        text = httpx.get(f"{address}/docs", timeout=300).text
    assert "POST /rewards/{reward}/v1/score</code>" in text and "{&#34;rewards&#34;: [number, ...]}" in text
    (tmp_path / "docs.html").write_text(text, encoding="utf-8")
    assert faults(browser_page(tmp_path / "docs.html", width=width, dark=dark)) == []
