"""Each column of a latent reward is the score that the model itself gives under that noise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.apps.evaluation.benchmark.pair_scores import NoiseColumns
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
    """Each noise level has the seeds and the key of the scorer's noise."""
    columns = NoiseColumns(RewardModelScorer(path, "mine"), [0.3, 0.8])
    assert columns.columns == ("mine", "mine sigma 0.3", "mine sigma 0.8")
    columns.prepare()
    model = columns.scorer.model
    given = ScoringNoise((0.5, 0.7), seeds=(3, 5), noise_key="image")
    of_image = [ScoringNoise((level,), seeds=(3, 5), noise_key="image") for level in (0.3, 0.8)]
    for noise, expected in {
        None: [model.noise, ScoringNoise((0.3,)), ScoringNoise((0.8,))],
        given: [given, *of_image],
    }.items():
        columns.scorer.noise = noise
        scores = columns(PROMPTS, images())
        for place, one in enumerate(expected):
            torch.testing.assert_close(scores[:, place], model.score(PROMPTS, images(), noise=one), atol=2e-5, rtol=0)
    assert columns.timesteps() == model.backbone.noise_process.timesteps_at(torch.tensor([0.3, 0.8])).tolist()
