"""The stochastic step of flow matching, its log-probability and gradient."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import FlowSDESampler, Transition
from latentreward.diffusion.noise.schedules import static_levels
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_close

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
every_case = pytest.mark.parametrize("case", cases("lpo/09"), ids=lambda case: case.name)


def sampler_of(case: Case, noise_level: str = "noise_level") -> FlowSDESampler:
    options = case.options
    return FlowSDESampler(
        *static_levels(options["scheduler_config"], options["num_inference_steps"]), options[noise_level]
    )


def step(sampler: FlowSDESampler, data: Tensors, prefix: str, index: Tensor) -> tuple[Transition, Tensor]:
    output = data[f"{prefix}.model_output"].clone().requires_grad_()
    return sampler.transition(data[f"{prefix}.sample"], output, sampler.timesteps[index]), output


@every_case
def test_schedule(case: Case) -> None:
    data, sampler = case.tensors(), sampler_of(case)
    assert_close(sampler.timesteps, data["timesteps"], "timesteps")
    assert_close(sampler._table[:, 0], data["sigmas"][:-1], "sigmas")
    assert data["sigmas"][-1] == sampler.next_timestep(len(sampler) - 1) == 0


@every_case
def test_steps(case: Case) -> None:
    data, sampler = case.tensors(), sampler_of(case)
    for number in case.options["step_indices"]:
        prefix = f"step{number}"
        index = torch.full((len(data[f"{prefix}.sample"]),), number)
        transition, output = step(sampler, data, prefix, index)
        log_prob = transition.log_prob(data[f"{prefix}.prev_sample"])
        log_prob.sum().backward()
        found = {
            "prev_mean": transition.mean,
            "prev_sample": transition.sample(data[f"{prefix}.noise"]),
            "log_prob": log_prob,
            "std_dev_t": transition.spread[:1],
            "noise_std": transition.std[:1],
            "grad_logprob_model_output": output.grad,
        }
        for name, value in found.items():
            assert_close(value, data[f"{prefix}.{name}"], f"{prefix}.{name}", **TOLERANCE)


@every_case
def test_rows_at_different_steps(case: Case) -> None:
    data, sampler = case.tensors(), sampler_of(case, "mixed_noise_level")
    transition, _ = step(sampler, data, "mixed", data["mixed.step_index"])
    found = {
        "prev_mean": transition.mean,
        "log_prob": transition.log_prob(data["mixed.prev_sample"]),
        "std_dev_t": transition.spread,
    }
    for name, value in found.items():
        assert_close(value, data[f"mixed.{name}"], f"mixed.{name}", **TOLERANCE)
