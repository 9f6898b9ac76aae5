"""Both forward processes against diffusers' own schedulers, and their refusals."""

import json
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from latentreward.core.errors import InputError
from latentreward.diffusion import (
    DDPM,
    DDPM_SCHEDULERS,
    FLOW_SCHEDULERS,
    FlowMatching,
    NoiseProcess,
    process_from_scheduler,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def saved(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The config as it stands in a pipeline's folder."""
    return json.loads(scheduler.to_json_string())


PROCESSES = [process_from_scheduler(saved(DDPMScheduler(**BETAS))), FlowMatching()]
IDS = ["ddpm", "flow"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_type", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_ddpm_equals_diffusers(scheduler_type: type, prediction_type: str) -> None:
    process = process_from_scheduler(saved(scheduler_type(**BETAS, prediction_type=prediction_type)))
    assert isinstance(process, DDPM)
    assert process.prediction_type == prediction_type
    oracle = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    latents, noise = torch.randn(2, 5, 4, 3, 3)
    timesteps = torch.tensor([0, 1, 500, 951, 999])
    torch.testing.assert_close(
        process.add_noise(latents, noise, timesteps), oracle.add_noise(latents, noise, timesteps), rtol=0, atol=0
    )
    torch.testing.assert_close(process.sigma(timesteps) ** 2, 1 - oracle.alphas_cumprod[timesteps])


def test_flow_equals_diffusers() -> None:
    oracle = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = process_from_scheduler(saved(oracle))
    assert isinstance(process, FlowMatching)
    torch.testing.assert_close(process.timesteps, oracle.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.sigmas, oracle.sigmas, rtol=1e-6, atol=0)
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), oracle.timesteps[[0, 400, 999]]
    torch.testing.assert_close(
        process.add_noise(latents, noise, timesteps),
        oracle.scale_noise(latents, timesteps, noise),
        rtol=1e-5,
        atol=1e-6,
    )
    assert process.sigmas[-1].item() == pytest.approx(0.002994, abs=1e-6)  # never clean


@pytest.mark.parametrize("config", [{}, {"shift": 5.0}, {"num_train_timesteps": 500}], ids=str)
def test_what_a_flow_config_leaves_out_is_as_in_diffusers(config: dict[str, Any]) -> None:
    oracle = FlowMatchEulerDiscreteScheduler(**config)
    process = process_from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})
    torch.testing.assert_close(process.sigmas, oracle.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.timesteps, oracle.timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_tables_descend_and_agree(process: NoiseProcess) -> None:
    assert (process.timesteps.diff() < 0).all()
    assert (process.sigmas.diff() < 0).all()
    torch.testing.assert_close(process.sigma(process.timesteps), process.sigmas, rtol=0, atol=0)
    torch.testing.assert_close(process.timesteps_at(process.sigmas), process.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(process.snap(process.timesteps), process.timesteps, rtol=0, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_sigma_is_the_standard_deviation_of_the_noise(process: NoiseProcess) -> None:
    timesteps = process.timesteps_at(torch.tensor([0.1, 0.5, 0.9]))
    noise = torch.randn(3, 1, 10_000)
    noisy = process.add_noise(torch.zeros(3, 1, 10_000), noise, timesteps)
    torch.testing.assert_close(noisy.std(dim=2)[:, 0], process.sigma(timesteps), rtol=0.05, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_nearest_level_of_any_target(process: NoiseProcess) -> None:
    targets = torch.rand(200)
    best = (process.sigmas[None] - targets[:, None]).abs().min(dim=1).values
    torch.testing.assert_close((process.sigmas[process.nearest(targets)] - targets).abs(), best, rtol=0, atol=0)
    assert process.nearest(torch.tensor([2.0, -1.0])).tolist() == [0, 999]


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
@pytest.mark.parametrize("shape", [(2, 7), (2, 4, 3, 5), (2, 4, 6, 3, 5)], ids=["vector", "image", "video"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_of_any_rank_keep_shape_and_dtype(
    process: NoiseProcess, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    latents, noise = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    noisy = process.add_noise(latents, noise, torch.tensor([1.0, 801.0]))
    assert noisy.shape == shape
    assert noisy.dtype == dtype
    alone = process.add_noise(latents[1:], noise[1:], torch.tensor([801.0]))
    torch.testing.assert_close(noisy[1:], alone, rtol=0, atol=0)


DDIM, EULER = {"_class_name": "DDIMScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}
BOTH = (*FLOW_SCHEDULERS, *DDPM_SCHEDULERS)


@pytest.mark.parametrize(
    ("config", "taken", "message"),
    [
        *(
            ({"_class_name": name}, BOTH, f"class {name}, whose predictions tell no noise process")
            for name in ("EDMEulerScheduler", "IPNDMScheduler", "MyScheduler", ["a"])
        ),
        ({"_class_name": "LCMScheduler"}, BOTH, "class LCMScheduler, whose predictions are of networks distilled"),
        (EULER, DDPM_SCHEDULERS, "class FlowMatchEulerDiscreteScheduler, .* published with one of DDIMScheduler, "),
        (DDIM, FLOW_SCHEDULERS, "class DDIMScheduler, .* with one of FlowMatchEulerDiscreteScheduler, "),
        ({**DDIM, "use_flow_sigmas": True}, DDPM_SCHEDULERS, "use_flow_sigmas=True, for another noise process"),
        ({**DDIM, "timestep_type": "continuous"}, DDPM_SCHEDULERS, "timestep_type=continuous, for another noise"),
        ({**DDIM, "prediction_type": "flow_prediction"}, DDPM_SCHEDULERS, "prediction_type 'flow_prediction'"),
        ({**DDIM, "beta_schedule": "cubic"}, DDPM_SCHEDULERS, "cubic is not implemented .*; get the pipeline as"),
        ({**EULER, "shift": "x"}, FLOW_SCHEDULERS, "shift: it must be a valid number, not 'x'"),
    ],
    ids=str,
)
def test_a_scheduler_of_another_process_is_refused(
    config: dict[str, Any], taken: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("['a']", r"\['a'\]")) as refused:
        process_from_scheduler(config, taken)
    assert "\n" not in str(refused.value)


def test_targets_are_what_networks_of_the_process_predict() -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 2)
    timesteps = torch.tensor([1, 500, 999])
    epsilon, v = (
        process_from_scheduler(saved(DDPMScheduler(**BETAS, prediction_type=kind)))
        for kind in ("epsilon", "v_prediction")
    )
    torch.testing.assert_close(epsilon.target(latents, noise, timesteps), noise, rtol=0, atol=0)
    velocity = DDPMScheduler(**BETAS).get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(v.target(latents, noise, timesteps), velocity, rtol=0, atol=0)
    flow = FlowMatching()
    low, high = flow.timesteps[700].repeat(3), flow.timesteps[300].repeat(3)
    moved = flow.add_noise(latents, noise, high) - flow.add_noise(latents, noise, low)
    slope = moved / (flow.sigmas[300] - flow.sigmas[700])
    torch.testing.assert_close(flow.target(latents, noise, low), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "process",
    [*PROCESSES, process_from_scheduler(saved(DDPMScheduler(**BETAS, prediction_type="v_prediction")))],
    ids=[*IDS, "v"],
)
def test_what_a_perfect_network_predicts_gives_the_clean_latents_back(process: NoiseProcess) -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).unbind(0)
    timesteps = process.snap(torch.tensor([20.0, 500.0, 900.0]))
    noisy = process.add_noise(latents, noise, timesteps)
    output = process.target(latents, noise, timesteps)
    torch.testing.assert_close(process.clean(noisy, output, timesteps), latents)


def test_a_scheduler_of_more_than_1000_timesteps_adds_noise_as_its_own() -> None:
    """Kolors has 1100."""
    scheduler = DDPMScheduler(num_train_timesteps=1100, **BETAS)
    process = process_from_scheduler(saved(scheduler))
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1099.0, 3.0])
    expected = scheduler.add_noise(latents, noise, timesteps.long())
    torch.testing.assert_close(process.add_noise(latents, noise, timesteps), expected)
