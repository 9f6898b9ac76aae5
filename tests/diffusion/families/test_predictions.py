"""Velocities and noise levels mean the same in every family, and are those of diffusers."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from torch import Tensor

from latentreward.alignment import Branching, Sampling
from latentreward.core.errors import InputError
from latentreward.diffusion import ContinuousFlow
from tests.diffusion.families.twins import TWINS, Twin, every_twin, noise_for


def sampler(twin: Twin, steps: int, noise_level: float = 0.7):
    height, width = twin.size
    return Sampling(steps, noise_level=noise_level, height=height, width=width).sampler(twin.source().resolve_family())


@every_twin
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95, 1.0])
def test_a_true_velocity_gives_the_latents_back(twin: Twin, sigma: float) -> None:
    family = twin.source().resolve_family()
    clean, noise = (noise_for(family.latent_shape(*twin.size), seed=seed) for seed in (1, 2))
    process = family.noise_process
    timesteps = process.timesteps_at(torch.tensor([sigma, sigma]))  # SD3's are those of its table
    sigma = process.sigma(timesteps)[0].item()
    noisy, velocity = process.add_noise(clean, noise, timesteps), process.target(clean, noise, timesteps)
    torch.testing.assert_close(process.clean(noisy, velocity, timesteps), clean, rtol=0, atol=2e-6)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity, noise, rtol=0, atol=2e-6)


@every_twin
def test_a_window_up_to_500_picks_noise_levels_up_to_one_half(twin: Twin) -> None:
    for count in (12, 28):  # of 28, shift 6 has a level of 1/2, rounded to 500.00006
        made = sampler(twin, count)
        steps = Branching(2, low=0, high=500).steps(made)
        sigmas: Tensor = twin.source().resolve_family().noise_process.sigma(made.timesteps)
        assert steps == [index for index, sigma in enumerate(sigmas.tolist()) if sigma <= 0.5 + 1e-6], count


@every_twin
def test_levels_run_from_the_noisiest_to_zero(twin: Twin) -> None:
    family = twin.source().resolve_family()
    timesteps, sigmas = family.levels(6, family.latent_shape(*twin.size))
    assert len(timesteps) == 6 and len(sigmas) == 7 and sigmas[-1] == 0 and sigmas[0] > 0.99
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(timesteps, 1000 * sigmas[:-1], rtol=0, atol=1.0)


@every_twin
@pytest.mark.parametrize("steps", [10, 40])
def test_noise_keeps_the_spread_of_the_states(twin: Twin, steps: int) -> None:
    """At native size: for pictures as small as twins', Ideogram 4's first step goes down to a level of a third."""
    family = twin.source().resolve_family()
    made = Sampling(steps, noise_level=0.7).sampler(family)
    sigmas = family.noise_process.sigma(made.timesteps)
    noise = torch.randn(1, 10000, generator=torch.Generator().manual_seed(0))
    step = made.transition(sigmas[0] * noise, noise, made.timesteps[:1])  # the velocity towards a picture of zeros
    assert (step.mean.var() + step.std**2).sqrt().item() == pytest.approx(sigmas[1].item(), rel=0.15)


def test_timesteps_of_a_continuous_flow_are_not_rounded_to_a_table() -> None:
    process = ContinuousFlow()
    times = torch.tensor([0.0, 123.456, 1000.0])
    assert torch.equal(process.sigma(times), times / 1000)
    assert process.timesteps_at(torch.tensor([0.0, 0.2345, 1.0])).tolist() == pytest.approx([1.0, 234.5, 1000.0])
    with pytest.raises(InputError, match="timestep 1001 is out of range"):
        process.sigma(torch.tensor([1001.0]))
    with torch.device("meta"):
        assert ContinuousFlow().timesteps.device.type == "cpu"


MU: dict[str, Callable[[int, int], float]] = {
    **dict.fromkeys(("flux1_dev", "flux1_schnell", "chroma"), lambda tokens, steps: calculate_shift(tokens)),
    **dict.fromkeys(("z_image", "z_image_turbo", "ernie_image", "lumina2"), lambda tokens, steps: 0.7),  # not read
    "krea2": lambda tokens, steps: 0.5 + 0.65 * (tokens - 256) / (6400 - 256),
    "krea2_turbo": lambda tokens, steps: 1.15,
    "klein_base": compute_empirical_mu,
    "qwen_image": lambda tokens, steps: calculate_shift(tokens, 256, 8192, 0.5, 0.9),
}
"""The shift of diffusers' pipelines, by tokens of the picture and steps."""


@pytest.mark.parametrize("name", MU)
@pytest.mark.parametrize(("size", "steps"), [((1024, 1024), 28), ((512, 768), 4)])
def test_levels_are_those_of_the_pipeline_at_any_size(name: str, size: tuple[int, int], steps: int) -> None:
    source = TWINS[name].source()
    family = source.resolve_family()
    scheduler = FlowMatchEulerDiscreteScheduler(**source.pipeline().config("scheduler"))
    scale = family.latent_space.downscale * family.packing  # pixels of a token; of FLUX.2's twin 4
    mu = MU[name](size[0] // scale * (size[1] // scale), steps)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    timesteps, sigmas = family.levels(steps, family.latent_shape(*size))
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(timesteps, scheduler.timesteps, rtol=0, atol=1e-3)


GUIDANCE: dict[str, tuple[float | None, float, float]] = {
    "flux1_dev": (3.5, 1.0, -1.0),
    "flux1_schnell": (None, 1.0, 3.5),
    "klein_base": (4.0, 1.0, 0.5),
    "klein_distilled": (None, 1.0, 4.0),
    "krea2": (4.5, 0.0, -1.0),
    "krea2_turbo": (None, 0.0, 4.5),
    "z_image": (5.0, 0.0, -1.0),
    "z_image_turbo": (None, 0.0, 4.0),
    "lumina2": (4.0, 1.0, 0.0),
    "wan21": (5.0, 1.0, 0.0),
}
"""The family's own scale, the one that is off, and one that is refused."""


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_is_checked_and_off_where_the_pipelines_is(name: str) -> None:
    family, (own, off, wrong) = TWINS[name].source().resolve_family(), GUIDANCE[name]
    assert (family.guidance(None), family.guidance(off)) == (own, off)
    embedded = name.startswith("flux1")  # dev's network takes it as an input
    assert family.needs_uncond(own) == (own is not None and not embedded) and not family.needs_uncond(off)
    assert family.needs_uncond(off + 1) != embedded
    with pytest.raises(InputError, match=f"guidance_scale={wrong:g}"):
        family.guidance(wrong)


@pytest.mark.parametrize(("size", "steps"), [((1024, 1024), 12), ((2048, 1024), 1), ((256, 256), 48)])
def test_levels_of_ideogram4_are_those_of_its_pipeline(size: tuple[int, int], steps: int) -> None:
    family = TWINS["ideogram4"].source().resolve_family()
    want = _logit_normal_sigmas(steps, _resolution_aware_mu(*size, base_mu=0.0), std=1.5)
    found = family.levels(steps, family.latent_shape(*size))[1]
    torch.testing.assert_close(found, torch.cat([want, torch.zeros(1)]), rtol=0, atol=1e-7)
