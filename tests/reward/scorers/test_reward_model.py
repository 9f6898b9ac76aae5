"""A trained reward model as a scorer of images."""

from pathlib import Path

import pytest
import torch

from latentreward.reward import ImageScorer, RewardModelScorer, ScoringNoise
from latentreward.reward.scorers.reward_model import reward_name
from tests.reward.scoring.models import load_lrm, pictures
from tests.reward.scoring.test_published import write_lrm
from tests.tiny_pipelines import pipeline_folder

PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lrm")
    write_lrm(path, "sd15")
    return path


@pytest.mark.slow
def test_it_scores_as_the_model_does(folder: Path) -> None:
    scorer = RewardModelScorer(str(folder), base=pipeline_folder("sd15"), device="cpu", batch_size=2)
    assert isinstance(scorer, ImageScorer)
    scorer.prepare()
    model, images = load_lrm(folder, pipeline_folder("sd15")), pictures(3)
    torch.testing.assert_close(scorer(PROMPTS, images), model.score(PROMPTS, images))
    levels = [ScoringNoise(timesteps=(1,)), ScoringNoise(sigmas=(0.3, 0.6))]
    torch.testing.assert_close(
        scorer.score_levels(PROMPTS, images, levels), model.score_levels(PROMPTS, images, levels), rtol=0, atol=2e-5
    )
    assert scorer.model.score("a cat", images).shape == (3,)


@pytest.mark.slow
def test_settings_reach_the_model_and_its_identity(folder: Path) -> None:
    noise = ScoringNoise(timesteps=(501,))
    base = pipeline_folder("sd15")
    scorers = [
        RewardModelScorer(str(folder), "lrm", base=base, device="cpu"),
        RewardModelScorer(str(folder), "lrm", base=base, device="cpu", noise=noise),
        RewardModelScorer(str(folder), "lrm", base=base, device="cpu", dtype="bfloat16"),
    ]
    assert len({scorer.identity() for scorer in scorers}) == 3
    assert all("\n" not in scorer.identity() and str(folder) in scorer.identity() for scorer in scorers)
    images = pictures(2)
    plain, by_timestep, half = (scorer.score(PROMPTS[:2], images) for scorer in scorers)
    assert torch.equal(by_timestep, scorers[0].model.score(PROMPTS[:2], images, noise=noise))
    assert 0 < (half - plain).abs().max() < 0.1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/first", "first"),
        ("runs/first/", "first"),
        ("runs/first/reward.ckpt", "first"),
        ("runs/first/checkpoints/last.ckpt", "first"),
        ("runs/first/checkpoints/epoch=1-step=20.ckpt", "first_epoch_1_step_20"),
        ("runs/lightning_logs/version_3", "runs"),
        ("somebody/DiNa-LRM-SD35M", "DiNa_LRM_SD35M"),
        ("runs/2024 grün", "reward_2024_gr_n"),
        ("image", "reward_image"),
    ],
)
def test_a_model_is_named_after_its_run(path: str, name: str) -> None:
    assert reward_name(path) == name
    assert RewardModelScorer(path, device="cpu").name == name
