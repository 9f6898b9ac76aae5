"""Flow matching: the schedule, nearest levels, noising of a pair, and where levels are drawn."""

import math

import pytest
import torch

from latentreward.diffusion import (
    BetaSigma,
    ConstantSigma,
    FlowMatching,
    LogitNormalSigma,
    ModeSigma,
    PowerSigma,
    TargetSigma,
    UniformSigma,
)
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

QUANTILE = {"rtol": 0.0, "atol": 0.02}
noising = pytest.mark.parametrize("case", cases("dina/noise", "noising"), ids=lambda case: case.name)
sampling = pytest.mark.parametrize("case", cases("dina/noise", "timestep_sampling"), ids=lambda case: case.name)


def process_of(case: Case) -> FlowMatching:
    defaults = {"num_train_timesteps": 1000, "shift": 3.0}
    return FlowMatching.from_config({name: case.options.get(name, value) for name, value in defaults.items()})


def sampler_of(scheme: str, param: float | str) -> TargetSigma:
    numbers = [float(number) for number in str(param).split("_")]
    family = {
        "constant": ConstantSigma,
        "logit_normal": LogitNormalSigma,
        "mode": ModeSigma,
        "power": PowerSigma,
        "beta": BetaSigma,
    }
    return UniformSigma() if scheme == "uniform" else family[scheme](*numbers)


@noising
def test_schedule(case: Case) -> None:
    data, process = case.tensors(), process_of(case)
    assert_close(process.sigmas, data["scheduler.sigmas"], "sigmas")
    assert_close(process.timesteps, data["scheduler.timesteps"], "timesteps")


@noising
def test_nearest_level(case: Case) -> None:
    data, process = case.tensors(), process_of(case)
    u = data["nearest.u"]
    assert torch.equal(process.nearest(u), data["nearest.index"])
    assert_close(process.timesteps_at(u), data["nearest.timestep"], "timestep")
    assert_close(process.sigma(process.timesteps_at(u)), data["nearest.sigma"], "sigma")


@noising
def test_pair_shares_level_and_noise(case: Case) -> None:
    data, process = case.tensors(), process_of(case)
    timesteps = process.timesteps_at(data["pair.u"])
    assert_close(timesteps, data["pair.timestep"], "timestep")
    assert_close(process.sigma(timesteps), data["pair.sigma"], "sigma")
    for side in ("chosen", "reject"):
        noisy = process.add_noise(data[f"pair.latent_{side}"], data["pair.noise"], timesteps)
        assert_close(noisy, data[f"pair.noisy_{side}"], side)


@noising
def test_released_index_map(case: Case) -> None:
    """The released code's other map, which it never uses and the library does not have: floor(u · T) into the table."""
    data = case.tensors()
    index = (data["index_map.u"] * len(data["scheduler.sigmas"])).long()
    assert_close(data["scheduler.sigmas"][index], data["index_map.sigma"], "sigma")
    assert_close(data["scheduler.timesteps"][index], data["index_map.timestep"], "timestep")


@sampling
def test_levels_from_given_random_numbers(case: Case) -> None:
    data, process = case.tensors(), process_of(case)
    for key, scheme in case.options["schemes"].items():
        if not scheme["deterministic"]:
            continue
        u = sampler_of(scheme["scheme"], scheme["param"]).transform(data["in.uniform"], data["in.normal"])
        assert_close(u, data[f"{key}.u"], f"{key}.u")
        # from the recorded u: rounding must not decide between two levels
        timesteps = process.timesteps_at(data[f"{key}.u"])
        assert_close(timesteps, data[f"{key}.timestep"], f"{key}.timestep")
        assert_close(process.sigma(timesteps), data[f"{key}.sigma"], f"{key}.sigma")


@sampling
def test_quantiles(case: Case) -> None:
    """Of evenly spread random numbers, so that the recorded draws alone bring noise."""
    data, process = case.tensors(), process_of(case)
    uniform = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).float()
    normal = torch.special.ndtri(uniform)
    for key, scheme in case.options["schemes"].items():
        u = sampler_of(scheme["scheme"], scheme["param"]).transform(uniform, normal)
        sigma = process.sigma(process.timesteps_at(u))
        assert_close(u.quantile(data["in.q"]), data[f"{key}.q_u"], f"{key}.q_u", **QUANTILE)
        assert_close(sigma.quantile(data["in.q"]), data[f"{key}.q_sigma"], f"{key}.q_sigma", **QUANTILE)
        for statistic, value in (("mean_u", u.mean().item()), ("std_u", u.std().item())):
            assert math.isclose(value, scheme[statistic], abs_tol=0.02), f"{key}.{statistic}"
