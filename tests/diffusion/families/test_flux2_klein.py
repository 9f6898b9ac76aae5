"""FLUX.2-klein: latents of the VAE, levels, text encoder, guidance, joint sequences, and what is refused."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentreward.diffusion.encoders.vae import PatchedLatentEncoder
from latentreward.diffusion.families.flux2_klein import Flux2Klein
from tests.diffusion.families.flux2_vae import CHANNELS, statistics
from tests.diffusion.families.twins import TWINS, noise_for

BASE, DISTILLED = TWINS["klein_base"], TWINS["klein_distilled"]


def copied(folder: Path, twin: Any = BASE) -> Flux2Klein:
    """The family of a copy of a twin, which may be changed."""
    copytree(twin.folder, folder, dirs_exist_ok=True)
    found = twin.source(source=str(folder)).resolve_family()
    assert isinstance(found, Flux2Klein)
    return found


def pixels(seed: int = 0) -> Tensor:
    return 2 * torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) - 1


def test_encoded_images_equal_the_pipelines() -> None:
    encoder = BASE.source().resolve_family().load_latent_encoder()
    assert isinstance(encoder, PatchedLatentEncoder)
    with torch.no_grad():
        want = BASE.pipeline()._encode_vae_image(pixels(), None)
    found = encoder.encode(pixels())
    assert found.shape == want.shape == (2, *encoder.latent_shape(pixels()))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_noise_of_the_posterior_has_the_shape_of_latents() -> None:
    encoder = BASE.source().resolve_family().load_latent_encoder()
    raw = noise_for((CHANNELS, 16, 24))
    with torch.no_grad():
        posterior = encoder.vae.encode(pixels()).latent_dist
    sample = posterior.mean + posterior.std * raw
    pipeline, (mean, variance) = BASE.pipeline(), statistics()
    noise = pipeline._patchify_latents(raw)
    want = pipeline._patchify_latents(sample) - mean.view(1, -1, 1, 1)
    found = encoder.encode(pixels(), noise) * (variance + 1e-4).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_statistics_stay_float32_in_a_bfloat16_vae() -> None:
    encoder = BASE.source().resolve_family().load_latent_encoder("bfloat16")
    assert encoder.vae.dtype == torch.bfloat16
    mean, variance = statistics()
    assert torch.equal(encoder.vae.bn.running_mean, mean)
    assert torch.equal(encoder.vae.bn.running_var, variance)


def test_space_is_told_by_the_statistics_and_epsilon(tmp_path: Path) -> None:
    same, weights = copied(tmp_path / "same").latent_space, tmp_path / "other" / "vae"
    assert same == DISTILLED.source().resolve_family().latent_space
    assert (same.channels, same.downscale, same.codec) == (16, 4, "batch_norm")
    other = copied(tmp_path / "other")
    path = weights / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["bn.running_var"][3] += 1e-3
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    assert copied_again(other).latent_space != same
    config = tmp_path / "same" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "batch_norm_eps": 1e-5}))
    assert BASE.source(source=str(tmp_path / "same")).resolve_family().latent_space != same


def copied_again(found: Flux2Klein) -> Any:
    """The family of the same folder, read anew."""
    return BASE.source(source=found.pipeline.source).resolve_family()
