"""Scores as reported, group accuracy, pair accuracy, and the VAE's latents."""

import io
from types import SimpleNamespace
from typing import Self

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentreward.core.contracts import ImageRef
from latentreward.data import PixelLoader
from latentreward.diffusion.backbones.loading import load_weights
from latentreward.diffusion.encoders.vae import LatentEncoder
from latentreward.reward import GroupPairAccuracy, LogisticSquash, PairwiseAccuracy, normalise_score
from tests.golden.catalogue import Case, cases
from tests.golden.closeness import assert_close

# A VAE's convolutions round otherwise on another processor: exact arithmetic is 3.3e-6 from the recorded latents.
CONVOLUTIONS = {"rtol": 1e-5, "atol": 1e-5}
metrics = pytest.mark.parametrize("case", cases("dina/metric", "metrics"), ids=lambda case: case.name)
vae = pytest.mark.parametrize("case", cases("dina/metric", "vae"), ids=lambda case: case.name)


@metrics
def test_normalised_score(case: Case) -> None:
    data = case.tensors()
    assert_close(normalise_score(data["norm.raw"]), data["norm.score"], "norm")


@metrics
def test_logistic_squash(case: Case) -> None:
    data = case.tensors()
    x = data["logistic.x"]
    assert_close(LogisticSquash()(x), data["logistic.y_init"], "y_init")
    squash = LogisticSquash(data["logistic.eta3"].item(), data["logistic.eta4"].item())
    assert_close(squash(x), data["logistic.y"], "y")


@metrics
def test_logistic_squash_has_a_gradient_where_the_released_one_is_nan(case: Case) -> None:
    x = (case.tensors()["logistic.x"] * 1e3).requires_grad_()
    LogisticSquash()(x).sum().backward()
    assert x.grad.isfinite().all()


@metrics
def test_group_accuracy(case: Case) -> None:
    data, together = case.tensors(), GroupPairAccuracy()
    for index, counts in enumerate(case.options["groups"]):
        scores, ranks = data[f"group{index}.scores"], data[f"group{index}.ranks"]
        metric = GroupPairAccuracy()
        metric.update(scores, ranks)
        together.update(scores, ranks)
        assert (int(metric.mean_value), int(metric.weight)) == (counts["correct"], counts["total"])
    correct, total = (sum(group[key] for group in case.options["groups"]) for key in ("correct", "total"))
    assert together.compute().item() == pytest.approx(correct / total)


@metrics
def test_pair_accuracy(case: Case) -> None:
    data, metric = case.tensors(), PairwiseAccuracy()
    metric.update(data["train_acc.chosen"], data["train_acc.reject"], torch.ones(len(data["train_acc.chosen"])))
    assert_close(metric.compute(), data["train_acc.accuracy"], "accuracy")


def encoder_of(case: Case) -> LatentEncoder:
    from diffusers import AutoencoderKL

    encoder = LatentEncoder(load_weights(AutoencoderKL, str(case.folder(case.options["vae_dir"]))))
    assert encoder.space.scaling_factor == case.options["scaling_factor"]
    assert encoder.space.shift_factor == case.options["shift_factor"]
    return encoder


@vae
def test_pixels(case: Case) -> None:
    data = case.tensors()
    for image, golden in zip(data["in.image_u8_bhwc"], data["pixels"], strict=True):
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "png")
        loader = PixelLoader(height=image.shape[0], width=image.shape[1])
        assert_close(loader(ImageRef("golden", data=file.getvalue())), golden, "pixels")


class RecordedPosterior:
    """Stands for a VAE whose posterior is the recorded one."""

    dtype = torch.float32

    def __init__(self, encoder: LatentEncoder, mean: Tensor, std: Tensor) -> None:
        self.config, self.latent_dist = encoder.vae.config, SimpleNamespace(mean=mean, std=std)

    def eval(self) -> Self:
        return self

    def requires_grad_(self, _: bool) -> Self:
        return self

    def encode(self, _: Tensor) -> Self:
        return self


@vae
def test_latents_of_the_recorded_posterior(case: Case) -> None:
    data = case.tensors()
    recorded = RecordedPosterior(encoder_of(case), data["posterior.mean"], data["posterior.std"])
    latents = LatentEncoder(recorded).encode(data["pixels"], data["in.eps"])
    assert_close(latents, data["latents"], "latents")


@vae
def test_latents(case: Case) -> None:
    data, encoder = case.tensors(), encoder_of(case)
    pixels = data["pixels"]
    mean = encoder.encode(pixels) / encoder.space.scaling_factor + encoder.space.shift_factor
    assert_close(mean, data["posterior.mean"], "posterior.mean", **CONVOLUTIONS)
    spread = (encoder.encode(pixels, torch.ones_like(mean)) - encoder.encode(pixels)) / encoder.space.scaling_factor
    assert_close(spread, data["posterior.std"], "posterior.std", **CONVOLUTIONS)
    assert_close(encoder.encode(pixels, data["in.eps"]), data["latents"], "latents", **CONVOLUTIONS)
    assert encoder.latent_shape(pixels) == tuple(data["latents"].shape[1:])


@vae
def test_decoded(case: Case) -> None:
    data = case.tensors()
    assert_close(encoder_of(case).decode(data["latents"]), data["decoded"], "decoded", **CONVOLUTIONS)
