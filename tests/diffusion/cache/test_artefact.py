"""The stored cache is the one that today's program makes of the same data and settings."""

from pathlib import Path

import pytest

from tests.artefacts import CACHED, lay_out
from tests.diffusion.cache.writing import contents, run_cache


@pytest.mark.slow
def test_the_same_settings_go_on_with_it_and_find_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(Path("cache"))
    run_cache(Path("cache"), Path("data"), *CACHED)
    assert "5 pairs, 9 images, 4 prompts" in capsys.readouterr().out
    assert contents(Path("cache")) == before
