"""The pretraining of the shipped pipelines runs."""

import json
from pathlib import Path

import pytest

from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline
from tools.pretraining.pipelines import main
from tools.pretraining.training import readme


@pytest.mark.slow
@pytest.mark.release
def test_pretraining_makes_pipelines(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--scale", "0.001"])
    for name in PIPELINE_FOLDERS:
        load_pipeline(tmp_path / name)
        assert json.loads((tmp_path / name / "recipe.json").read_text())["recipe"]["seed"] == 0
        assert (tmp_path / name / "README.md").is_file()
    assert not (tmp_path / "pretraining").exists()


@pytest.mark.parametrize("name", PIPELINE_FOLDERS)
def test_the_readmes_of_the_shipped_pipelines_have_their_figures(name: str) -> None:
    recipe = json.loads((PIPELINE_FOLDERS[name] / "recipe.json").read_text())
    figures = {figure: f"{value:.3f}" for figure, value in recipe["figures"].items()}
    expected = readme(name, prompts=recipe["recipe"]["prompts"], **figures)
    assert (PIPELINE_FOLDERS[name] / "README.md").read_text() == expected
