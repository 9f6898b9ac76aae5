"""Each column of a latent reward is the score that the model itself gives under that noise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.apps.evaluation.benchmark.sections import NoiseColumns
from latentreward.reward import RewardModelScorer, ScoringNoise
from tests.alignment.rewards.stored import write_run

PROMPTS = ["a cat", "two dogs"]


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.fixture(scope="module", params=["lrm", "dina"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_run(folder, request.param, {"lrm": "sd15", "dina": "sd35"}[request.param])
    return str(folder)


def test_columns_are_the_models_own_scores(path: str) -> None:
    columns = NoiseColumns(RewardModelScorer(path, "mine"), [0.3, 0.8], 2)
    assert columns.columns == ("mine", "mine draw 1", "mine sigma 0.3", "mine sigma 0.8")
    columns.prepare()
    scores = columns(PROMPTS, images())
    model = columns.scorer.model
    own = model.noise
    second = ScoringNoise(own.sigmas, own.timesteps, seeds=(1,))
    for place, noise in enumerate([own, second, ScoringNoise((0.3,)), ScoringNoise((0.8,))]):
        torch.testing.assert_close(scores[:, place], model.score(PROMPTS, images(), noise=noise), atol=2e-5, rtol=0)
    assert columns.timesteps() == model.backbone.noise_process.timesteps_at(torch.tensor([0.3, 0.8])).tolist()


def test_draws_do_not_share_seeds(path: str) -> None:
    noise = ScoringNoise((0.5,), seeds=(3, 5))
    columns = NoiseColumns(RewardModelScorer(path, "mine", noise=noise), [], 3)
    columns.prepare()
    model = columns.scorer.model
    scores = columns(PROMPTS, images())
    for place, seeds in enumerate([(3, 5), (6, 8), (9, 11)]):
        alone = model.score(PROMPTS, images(), noise=ScoringNoise((0.5,), seeds=seeds))
        torch.testing.assert_close(scores[:, place], alone, atol=2e-5, rtol=0)


def test_levels_keep_the_scorers_seeds(path: str) -> None:
    noise = ScoringNoise((0.5, 0.7), seeds=(3, 5))
    columns = NoiseColumns(RewardModelScorer(path, "mine", noise=noise), [0.3], 1)
    columns.prepare()
    alone = ScoringNoise((0.3,), seeds=(3, 5))
    expected = columns.scorer.model.score(PROMPTS, images(), noise=alone)
    torch.testing.assert_close(columns(PROMPTS, images())[:, 1], expected, atol=2e-5, rtol=0)
