"""A calibrated score says where an image stands in the reference set; what cannot be calibrated is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentreward.core.errors import InputError
from latentreward.reward import Calibration, ScoringNoise
from latentreward.reward.scoring.scoring_noise import FEWEST, GRID
from latentreward.reward.scoring.stored import FolderConfig
from tests.reward.scoring.test_model_card import config

NOISE = ScoringNoise(sigmas=(0.4,))


def normal_scores(number: int = 5000, seed: int = 0) -> torch.Tensor:
    return 3.0 + 2.0 * torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_reference_set_itself_has_mean_0_spread_1_and_even_quantiles() -> None:
    scores = normal_scores()
    calibration = Calibration.fit(scores, "reference", NOISE)
    z = calibration.z_score(scores)
    assert z.mean().item() == pytest.approx(0, abs=1e-6)
    assert z.std().item() == pytest.approx(1, abs=1e-6)
    ranks = scores.argsort().argsort().double() / (len(scores) - 1)
    assert (calibration.quantile(scores).double() - ranks).abs().max() < 1 / (GRID - 1)
    assert len(calibration.quantiles) == GRID
    assert calibration.number == 5000


@pytest.mark.parametrize("number", [FEWEST, 57, 1000, 1001, 4321])
def test_quantiles_are_numpy_s(number: int) -> None:
    scores = normal_scores(number)
    calibration = Calibration.fit(scores, "reference", NOISE)
    expected = np.quantile(scores.numpy(), np.linspace(0, 1, GRID))
    np.testing.assert_allclose(calibration.quantiles, expected, rtol=1e-12, atol=1e-12)
    probes = torch.linspace(-8, 14, 999, dtype=torch.float64)
    interpolated = np.interp(probes.numpy(), expected, np.linspace(0, 1, GRID))
    np.testing.assert_allclose(calibration.quantile(probes).numpy(), interpolated, atol=2e-6)


def test_quantiles_are_monotone_and_clamped_and_keep_shape_and_nan() -> None:
    calibration = Calibration.fit(normal_scores(), "reference", NOISE)
    probes = torch.linspace(-20, 30, 6003).reshape(3, 2001)
    quantiles = calibration.quantile(probes)
    assert quantiles.shape == probes.shape
    assert (quantiles.flatten().diff() >= 0).all()
    assert (quantiles.min(), quantiles.max()) == (0, 1)
    extreme = calibration.quantile(torch.tensor([-torch.inf, torch.inf, torch.nan]))
    assert extreme[:2].tolist() == [0, 1]
    assert extreme[2].isnan()
    assert calibration.quantile(torch.zeros(0)).shape == (0,)


def test_a_value_that_half_the_reference_set_shares_is_its_middle() -> None:
    scores = torch.cat([torch.full((500,), 2.0), torch.linspace(0, 1, 250), torch.linspace(3, 4, 250)])
    calibration = Calibration.fit(scores, "reference", NOISE)
    assert calibration.quantile(torch.tensor([2.0])).item() == pytest.approx(0.5, abs=1e-6)
    assert calibration.quantile(torch.tensor([1.999])).item() == pytest.approx(0.25, abs=0.002)
    assert calibration.quantile(torch.tensor([2.001])).item() == pytest.approx(0.75, abs=0.002)


def test_json_keeps_every_bit() -> None:
    noise = ScoringNoise(timesteps=(1, 251), seeds=(0, 3))
    calibration = Calibration.fit(normal_scores(100) / 3, "ünïcode", noise, seed=7)
    again = FolderConfig.of_record(json.loads(replace(config(), calibration=calibration).text())).calibration
    assert again == calibration
    assert again.noise == noise


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("mean"),
        lambda record: record.update(extra=1),
        lambda record: record.update(std=0.0),
        lambda record: record.update(quantiles=[1.0]),
        lambda record: record.update(quantiles=[2.0, 1.0]),
        lambda record: record.update(quantiles=7),
        lambda record: record.update(noise={"sigmas": [2.0]}),
        lambda record: record.update(noise=None),
    ],
)
def test_damaged_records(change) -> None:
    record = json.loads(config().text())
    change(record["calibration"])
    with pytest.raises(InputError, match=r"calibration") as caught:
        FolderConfig.of_record(record)
    assert "\n" not in str(caught.value)
