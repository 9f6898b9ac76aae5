"""A file of prompts for commands that sample."""

from pathlib import Path

import pytest


@pytest.fixture
def prompts(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """File with the ``PROMPTS`` of the test's module, one a line."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(request.module.PROMPTS), encoding="utf-8")
    return path
