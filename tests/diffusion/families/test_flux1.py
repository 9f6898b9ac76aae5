"""FLUX.1: levels, embedded guidance, lengths of prompts, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from latentreward.core.errors import InputError
from latentreward.diffusion import find_family
from latentreward.diffusion.families.flux1 import Flux1
from latentreward.diffusion.noise.schedules import EULER
from tests.diffusion.families.made_configs import MadeConfigs
from tests.diffusion.families.test_parity import STEPS, assert_near, sampled
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for

VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "scaling_factor": 0.3611,
       "shift_factor": 0.1159}  # fmt: skip
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15,
           "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip
STATIC = {"shift": 1.0}


def family(dev: bool = True, index: Mapping[str, Any] | None = None, **network: Any) -> Any:
    transformer = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": dev, **network}
    parts = {
        "transformer": transformer,
        "vae": VAE,
        "scheduler": {"_class_name": EULER, **(DYNAMIC if dev else STATIC)},
    }
    return find_family(MadeConfigs(parts, **{"_class_name": "FluxPipeline", **(index or {})}))


@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize(("size", "steps"), [((1024, 1024), 28), ((512, 768), 4)])
def test_levels_equal_those_of_the_pipeline(dev: bool, size: tuple[int, int], steps: int) -> None:
    found = family(dev)
    scheduler = FlowMatchEulerDiscreteScheduler(**(DYNAMIC if dev else STATIC))
    mu = calculate_shift(size[0] // 16 * (size[1] // 16), 256, 4096, 0.5, 1.15)
    want, _ = retrieve_timesteps(scheduler, sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    timesteps, sigmas = found.levels(steps, found.latent_shape(*size))
    torch.testing.assert_close(timesteps, want, rtol=0, atol=1e-3)
    torch.testing.assert_close(sigmas, scheduler.sigmas)


def test_shift_at_native_size() -> None:
    found = family()
    assert found.native_size == (1024, 1024)
    assert found.latent_shape() == (16, 128, 128)
    assert found.mu(28, found.latent_shape()) == pytest.approx(1.15)
    _, sigmas = family(dev=False).levels(4, found.latent_shape())
    assert sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_guidance_is_an_input_of_dev() -> None:
    dev, schnell = family(), family(dev=False)
    assert (dev.guidance(None), dev.guidance(0.0), dev.guidance(1.0)) == (3.5, 0.0, 1.0)
    assert not any(kind.needs_uncond(scale) for kind in (dev, schnell) for scale in (None, 1.0, 3.5))
    with pytest.raises(InputError, match="guidance_scale=-1 must be at least 0"):
        dev.guidance(-1.0)
    assert (schnell.guidance(None), schnell.guidance(schnell.no_guidance)) == (None, 1.0)
    with pytest.raises(InputError, match=r"FLUX.1-schnell was distilled to sample without guidance"):
        schnell.guidance(3.5)


@pytest.mark.slow
def test_other_guidance_equals_the_pipelines() -> None:
    twin = replace(TWINS["flux1_dev"], call={"guidance_scale": 8.0}, guidance=8.0)
    noise = noise_for(twin.source().resolve_family().latent_shape(*twin.size))
    found = sampled(twin, PROMPTS, noise)
    assert_near(found, twin.sample(twin.pipeline(), PROMPTS, noise, STEPS))
    assert (found - sampled(replace(twin, guidance=3.5), PROMPTS, noise)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "length"), [("flux1_dev", 512), ("flux1_schnell", 256)])
def test_number_of_t5_tokens(name: str, length: int) -> None:
    found = TWINS[name].source().resolve_family()
    assert found.load_prompt_encoder().num_tokens == length
    encoder = found.load_prompt_encoder(t5_length=77)
    encoded = encoder(PROMPTS)
    assert encoded.prompt_embeds.shape == (2, 77, encoder.token_dim)
    assert encoded.pooled().shape == (2, encoder.pooled_dim)
    assert encoded.prompt_mask is None


@pytest.mark.parametrize("length", [0, 513])
def test_numbers_of_t5_tokens_out_of_range_are_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"t5_length={length} must be a whole number from 1 to 512"):
        TWINS["flux1_dev"].source().resolve_family().load_prompt_encoder(t5_length=length)


def test_t5_cannot_be_left_out() -> None:
    with pytest.raises(InputError, match=r"load_t5=false: FLUX.1 takes a prompt's tokens from T5"):
        TWINS["flux1_dev"].source(load_t5=False).load()


@pytest.mark.parametrize("channels", [384, 128])  # Fill, Canny
def test_networks_with_channels_of_images_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=f"takes {channels} channels.* 4 positions have 64; give a text-to-image"):
        family(in_channels=channels)


@pytest.mark.parametrize("name", ["FluxKontextInpaintPipeline", "FluxFillPipeline", "FluxControlPipeline"])
def test_pipelines_that_take_images_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"is a {name}: it"):
        family(index={"_class_name": name})


def test_pipeline_without_dynamic_shifting_has_the_static_shift(tmp_path: Path) -> None:
    copytree(TWINS["flux1_dev"].folder, tmp_path / "static")
    path = tmp_path / "static" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dynamic_shifting": False, "shift": 1.0}))
    found = TWINS["flux1_dev"].source(source=str(tmp_path / "static")).resolve_family()
    assert isinstance(found, Flux1)
    assert found.levels(2, found.latent_shape(32, 48))[1].tolist() == [1.0, 0.5, 0.0]
