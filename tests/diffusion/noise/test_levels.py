"""Each sampler's distribution, that draws are functions of the generator alone, and refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from latentreward.core.errors import InputError
from latentreward.diffusion import (
    BetaSigma,
    ConstantSigma,
    ContinuousFlow,
    FlowMatching,
    LevelSampler,
    LogitNormalSigma,
    ModeSigma,
    PowerSigma,
    TargetSigma,
    TimestepGrid,
    UniformSigma,
    process_from_scheduler,
)

DDPM_PROCESS = process_from_scheduler({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
SAMPLERS = [
    UniformSigma(),
    UniformSigma(0.2, 0.4),
    ConstantSigma(0.3),
    LogitNormalSigma(0.5, 0.8),
    ModeSigma(),
    ModeSigma(-1.0),
    PowerSigma(3.0),
    BetaSigma(2.0, 5.0),
    TimestepGrid(),
]
NAMES = [type(sampler).__name__ for sampler in SAMPLERS]


def draws(sampler: TargetSigma, count: int = 200_000) -> Tensor:
    generator = Generator().manual_seed(3)
    return sampler.transform(torch.rand(count, generator=generator), torch.randn(count, generator=generator))


@pytest.mark.parametrize(
    ("sampler", "distribution"),
    [
        (UniformSigma(0.2, 0.7), lambda u: ((u - 0.2) / 0.5).clamp(0, 1)),
        (PowerSigma(3.0), lambda u: u ** (1 / 3)),
        (LogitNormalSigma(0.5, 0.8), lambda u: torch.special.ndtr((torch.logit(u) - 0.5) / 0.8)),
        (BetaSigma(2.0, 1.0), lambda u: u**2),
        (BetaSigma(1.0, 3.0), lambda u: 1 - (1 - u) ** 3),
        (BetaSigma(0.5, 0.5), lambda u: 2 / math.pi * torch.asin(u.sqrt())),
        (BetaSigma(0.1, 1.0), lambda u: u**0.1),
        (BetaSigma(1.0, 0.2), lambda u: 1 - (1 - u) ** 0.2),
    ],
)
def test_distribution_function(sampler: TargetSigma, distribution: Callable[[Tensor], Tensor]) -> None:
    u, points = draws(sampler), torch.linspace(0.01, 0.99, 50)
    empirical = (u[:, None] <= points).float().mean(dim=0)
    torch.testing.assert_close(empirical, distribution(points), rtol=0, atol=0.006)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_sampler_is_a_monotone_map_of_the_unit_interval(scale: float) -> None:
    u = ModeSigma(scale).transform(torch.linspace(0, 1, 1001), torch.zeros(1001))
    assert u[0].item() == pytest.approx(1.0, abs=1e-6)
    assert u[-1].item() == pytest.approx(0.0, abs=1e-6)
    assert (u.diff() <= 1e-6).all()


@pytest.mark.parametrize("process", [DDPM_PROCESS, FlowMatching()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
def test_draw_is_a_timestep_of_the_process_and_of_the_generator_alone(sampler: LevelSampler, process) -> None:
    drawn = [sampler.draw(Generator().manual_seed(seed), process) for seed in range(20)]
    torch.rand(7)
    again = [sampler.draw(Generator().manual_seed(seed), process) for seed in range(20)]
    for first, second in zip(drawn, again, strict=True):
        assert first.shape == (1,)
        assert first.dtype == torch.float32
        assert first.item() in process.timesteps
        assert first.item() == second.item()


def test_lrm_grid_is_its_twenty_timesteps() -> None:
    grid = TimestepGrid()
    drawn = {grid.draw(Generator().manual_seed(seed), DDPM_PROCESS).item() for seed in range(400)}
    assert drawn == {float(t) for t in range(1, 952, 50)}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: UniformSigma(0.8, 0.2), "low=0.8"),
        (lambda: UniformSigma(-0.1), "low=-0.1"),
        (lambda: ConstantSigma(1.5), "sigma=1.5"),
        (lambda: LogitNormalSigma(std=0.0), "std=0"),
        (lambda: LogitNormalSigma(std=math.inf), "std=inf"),
        (lambda: ModeSigma(2.0), "scale=2"),
        (lambda: PowerSigma(0.0), "power=0"),
        (lambda: PowerSigma(math.inf), "power=inf"),
        (lambda: BetaSigma(0.0, 1.0), "a=0"),
        (lambda: BetaSigma(1.0, math.inf), "b=inf"),
        (lambda: TimestepGrid(step=0), "step=0"),
        (lambda: TimestepGrid(start=900, stop=1), "start=900"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], LevelSampler], field: str) -> None:
    with pytest.raises(InputError, match=field):
        make()


def test_a_flow_of_any_level_keeps_timesteps_from_1_on() -> None:
    assert ContinuousFlow().snap(torch.tensor([0.0, 0.25, 7.5])).tolist() == [1.0, 1.0, 7.5]
