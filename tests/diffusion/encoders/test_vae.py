"""Latents against diffusers' own VAE calls."""

import json

import pytest
import torch

from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.encoders.vae import LatentEncoder
from tests.tiny_pipelines import LATENTS, PIXELS, pipeline_folder


@pytest.fixture(params=["sd15", "sd35"])
def encoder(request: pytest.FixtureRequest) -> LatentEncoder:
    return PipelineSource(pipeline_folder(request.param)).latent_encoder()


def test_mean_and_sample_equal_diffusers(encoder: LatentEncoder) -> None:
    pixels, config = torch.rand(2, 3, PIXELS, PIXELS) * 2 - 1, encoder.vae.config
    noise = torch.randn(2, 4, LATENTS, LATENTS)
    posterior = encoder.vae.encode(pixels).latent_dist
    shift = config.shift_factor or 0.0
    torch.testing.assert_close(encoder.encode(pixels), (posterior.mode() - shift) * config.scaling_factor)
    sample = posterior.mean + posterior.std * noise
    torch.testing.assert_close(encoder.encode(pixels, noise), (sample - shift) * config.scaling_factor)
    assert encoder.latent_shape(pixels) == (4, LATENTS, LATENTS)


def test_decode_undoes_the_scaling(encoder: LatentEncoder) -> None:
    latents = torch.randn(1, 4, LATENTS, LATENTS)
    config = encoder.vae.config
    expected = encoder.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    torch.testing.assert_close(encoder.decode(latents), expected)


def test_vae_stays_frozen_and_in_its_dtype_under_autocast() -> None:
    encoder = PipelineSource(pipeline_folder("sd15")).latent_encoder("bfloat16")
    seen = []
    encoder.vae.encoder.conv_in.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.float16):
        latents = encoder.encode(torch.zeros(1, 3, PIXELS, PIXELS))
    assert seen == [torch.bfloat16]
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_bfloat16_autocast_halves_the_products_and_not_the_weights(encoder: LatentEncoder) -> None:
    pixels, seen = torch.rand(2, 3, PIXELS, PIXELS) * 2 - 1, []
    expected = encoder.encode(pixels)
    encoder.vae.encoder.conv_in.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        latents = encoder.encode(pixels)
    assert seen == [torch.bfloat16]
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.02 * expected.std()
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_space_comes_from_the_config_alone() -> None:
    space = LatentEncoder.space_of(
        {"latent_channels": 16, "block_out_channels": [1, 2, 3, 4], "scaling_factor": 1.5305, "shift_factor": 0.0609}
    )
    assert space == LatentSpace(16, 8, 1.5305, 0.0609)
    without_shift = {"latent_channels": 4, "block_out_channels": [1], "scaling_factor": 0.5}
    assert LatentEncoder.space_of(without_shift).shift_factor == 0
    records = [
        json.dumps(LatentEncoder.space_of({**without_shift, "shift_factor": value}).record()) for value in (0, 0.0)
    ]
    assert records[0] == records[1]
    assert LatentEncoder.space_of({"latent_channels": 4, "block_out_channels": [1] * 4}) == LatentSpace(4, 8, 0.18215)
    with pytest.raises(InputError, match="has latents_mean, a number for each channel, which is not supported"):
        LatentEncoder.space_of({**without_shift, "latents_mean": [[[[0.1]]]]})
    assert str(space) == "16 channels, 1/8 size, scale 1.5305, shift 0.0609"
