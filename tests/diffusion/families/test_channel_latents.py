"""Latents of Wan 2.1 and Qwen-Image: one space, exact pixels, gradients that the VAEs' clamp does not stop."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor

from latentreward.diffusion.encoders.vae import ChannelLatentEncoder
from tests.diffusion.families.made_wan21 import vae
from tests.tiny_pipelines import randomise

KINDS = (AutoencoderKLWan, AutoencoderKLQwenImage)
every_kind = pytest.mark.parametrize("kind", KINDS)


def encoder(kind: type) -> ChannelLatentEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = vae(kind)
    randomise(made)
    with torch.no_grad():
        made.decoder.conv_out.weight *= 8  # so that pixels leave [-1, 1]
    return ChannelLatentEncoder(made, ChannelLatentEncoder.space_of(made.config))


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@every_kind
@pytest.mark.parametrize("frames", [1, 5])
def test_encoding(kind: type, frames: int) -> None:
    own = encoder(kind)
    pixels = drawn(2, 3, frames, 32, 48).clamp(-1, 1)
    with torch.no_grad():
        posterior = own.vae.encode(pixels).latent_dist
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (own.space.means, own.space.stds))
    given = pixels[:, :, 0] if frames == 1 else pixels
    assert own.latent_shape(given) == posterior.mean.shape[1:]
    torch.testing.assert_close(own.encode(given), (posterior.mean - mean) / std)
    noise = drawn(*posterior.mean.shape)
    torch.testing.assert_close(own.encode(given, noise), (posterior.mean + posterior.std * noise - mean) / std)


@every_kind
@pytest.mark.parametrize("frames", [1, 5])
def test_decoding_is_clamped_but_its_gradient_is_not(kind: type, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = encoder(kind)
    latents = drawn(2, *own.space.shape(32, 48, frames), scale=3.0).requires_grad_()
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (own.space.means, own.space.stds))
    pixels = own.decode(latents)
    want = own.vae.decode(latents * std + mean).sample
    assert 0.02 < (want.abs() == 1).float().mean() < 0.98
    assert torch.equal(pixels, want.squeeze(2) if frames == 1 else want)
    weights = drawn(*want.shape)
    (found,) = torch.autograd.grad((pixels * weights.reshape(pixels.shape)).sum(), latents)
    (stopped,) = torch.autograd.grad((want * weights).sum(), latents)
    monkeypatch.setattr(torch, "clamp", lambda values, **limits: values)
    free = own.vae.decode(latents * std + mean).sample
    (wanted,) = torch.autograd.grad((free * weights).sum(), latents)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
    assert (found - stopped).abs().max() > 0.01 * wanted.abs().max()
    assert not own.vae.decoder._forward_hooks
