"""The pretraining of the tiny editors runs, and a kept editor is left alone."""

import json
from pathlib import Path

import pytest

from latentreward.diffusion import find_family
from latentreward.diffusion.backbones.loading import PipelineSource
from tools.pretraining.editors import EDITORS, main

FAMILIES = {"kontext_tiny": "flux1_kontext", "ip2p_tiny": "instruct_pix2pix"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_pretraining_makes_an_editor(name: str, tmp_path: Path) -> None:
    main([name, "--output", str(tmp_path), "--scale", "0.001"])
    recipe = tmp_path / name / "recipe.json"
    assert set(json.loads(recipe.read_text())["figures"]) == {"followed", "kept", "utility"}
    assert "followed" in (tmp_path / name / "README.md").read_text()
    assert find_family(PipelineSource(str(tmp_path / name))).name == FAMILIES[name]
    written = recipe.stat().st_mtime_ns
    main([name, "--output", str(tmp_path)])
    assert recipe.stat().st_mtime_ns == written
