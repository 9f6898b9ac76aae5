"""The stochastic DDIM step, its log-probability and gradient, for noise and v predictions."""

import pytest
import torch

from latentreward.alignment import DDIMSampler
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
every_case = pytest.mark.parametrize("case", cases("lpo/05"), ids=lambda case: case.name)


def sampler_of(case: Case, prediction_type: str | None = None) -> DDIMSampler:
    options = case.options
    config = dict(options["scheduler_config"])
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    return DDIMSampler(config, options["num_inference_steps"], options["eta"])


@every_case
def test_schedule(case: Case) -> None:
    data, sampler = case.tensors(), sampler_of(case)
    alphas = data["alphas_cumprod"]
    following = data["prev_timesteps"]
    signal, spread, signal_next, *_ = sampler._table.unbind(dim=1)
    assert_close(sampler.timesteps, data["timesteps"], "timesteps")
    assert_close(signal**2, alphas[data["timesteps"]], "alphas at the timesteps")
    assert_close(spread**2, 1 - alphas[data["timesteps"]], "noise at the timesteps")
    assert_close(signal_next**2, alphas[following], "alphas after the steps")
    assert_close(signal_next[-1] ** 2, data["final_alpha_cumprod"], "alpha after the last step")
    assert_close(sampler.noise_std, data["std_by_step"], "std")
    assert_close(sampler.noise_std**2, data["variance_by_step"], "variance")


@every_case
def test_steps(case: Case) -> None:
    data = case.tensors()
    kinds = {name.split(".t")[0] for name in data if name.endswith(".prev_mean")}
    for kind in sorted(kinds):
        sampler = sampler_of(case, kind)
        for timestep in case.options["step_timesteps"]:
            prefix = f"{kind}.t{timestep}."
            sample, output = data[f"{prefix}sample"], data[f"{prefix}model_output"].clone().requires_grad_()
            timesteps = torch.full((len(sample),), timestep)
            transition = sampler.transition(sample, output, timesteps)
            clean = sampler.clean(sample, output, timesteps)
            alpha = data["alphas_cumprod"][timestep]
            candidates = transition.sample(data[f"{prefix}noise"])
            log_prob = transition.log_prob(data[f"{prefix}prev_sample"])
            found = {
                "prev_mean": transition.mean,
                "pred_original_sample": clean,
                "pred_epsilon": (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt(),
                "prev_sample": candidates,
                "log_prob": log_prob,
                "std": transition.std[:1],
            }
            for name, value in found.items():
                assert_close(value, data[prefix + name], prefix + name, **TOLERANCE)
            log_prob[0].sum().backward()
            name = f"{prefix}grad_logprob_model_output_k0"
            assert_close(output.grad, data[name], name, **TOLERANCE)


@every_case
def test_half_precision_rows_at_different_timesteps(case: Case) -> None:
    data, sampler = case.tensors(), sampler_of(case)
    transition = sampler.transition(data["mixed.sample_fp16"], data["mixed.model_output"], data["mixed.timesteps"])
    log_prob = transition.log_prob(data["mixed.prev_sample_fp16"])
    assert_close(log_prob, data["mixed.log_prob"], "mixed.log_prob", **TOLERANCE)
