"""The pretraining of the shipped pipelines runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentreward.tinyworld.sampling import PIPELINE_FOLDERS, load_pipeline
from tools.pretraining.pipelines import main
from tools.pretraining.training import readme
from tools.pretraining.vae import LATENT_STD, build_vae, draw_training_pictures, normalize_pictures, standardize_latents


def test_standardising_keeps_reconstructions() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    pictures = normalize_pictures(draw_training_pictures(32, np.random.default_rng(5))[0])
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        standardize_latents(vae, pictures)
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.full((4,), LATENT_STD), atol=0.01, rtol=0.01)


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
