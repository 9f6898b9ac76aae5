"""SPO's step-aware CLIP: transformers' own forward with hooks as the oracle, weights from all sources, refusals."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from latentreward.core.errors import InputError
from latentreward.data.images import to_pixels
from latentreward.reward import CLIPScorer, StepAwareScorer
from latentreward.reward.scorers.step_aware import (
    STEP_FILE,
    StepAwareCLIP,
    embed_timesteps,
    load_step_aware,
    prepare_pixels,
)
from tests.reward.scorers.tiny_clip import PIXELS

PROMPTS = ["a cat", "", "naïve 🦊\n\nsecond", "word " * 400]
TIMESTEPS = torch.tensor([0.0, 1.0, 501.0, 999.0])


def plain(clip_folder: str) -> StepAwareCLIP:
    return load_step_aware(clip_folder)[0]


def trained(clip_folder: str) -> StepAwareCLIP:
    """As if it had been trained: every weight is another one than at the start."""
    network, generator = plain(clip_folder), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def images(count: int = 4, height: int = PIXELS, width: int = PIXELS) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published(network: StepAwareCLIP) -> dict[str, Tensor]:
    """The tensors as SPO's released file names them."""
    names = {}
    for name, value in network.state_dict().items():
        new = name.removeprefix("clip.").replace("time_embedder.", "t_embedder.mlp.")
        new = new.replace("final_modulation.", "vision_model.adaLN_modulation.")
        if name.startswith("layer_modulation."):
            _, layer, rest = name.split(".", 2)
            new = f"vision_model.encoder.layers.{layer}.adaLN_modulation.{rest}"
        names[f"model.{new}"] = value.clone()
    return {**names, "model.text_model.embeddings.position_ids": torch.arange(12)[None]}


def modulate(network: StepAwareCLIP, timesteps: Tensor) -> None:
    """Hooks that make transformers' own vision tower the modulated one (adaLN, arXiv:2212.09748)."""
    time = network.time_embedder(embed_timesteps(timesteps))
    for layer, modulation in zip(network.clip.vision_model.encoder.layers, network.layer_modulation, strict=True):
        parts = modulation(time)[:, None].chunk(6, dim=-1)
        for norm, block, (shift, scale, gate) in (
            (layer.layer_norm1, layer.self_attn, parts[:3]),
            (layer.layer_norm2, layer.mlp, parts[3:]),
        ):
            norm.register_forward_hook(lambda *a, shift=shift, scale=scale: a[2] * (1 + scale) + shift)
            block.register_forward_hook(
                lambda *a, gate=gate: (gate * a[2][0], a[2][1]) if isinstance(a[2], tuple) else gate * a[2]
            )
    shift, scale = network.final_modulation(time).chunk(2, dim=-1)
    network.clip.vision_model.post_layernorm.register_forward_hook(lambda *a: a[2] * (1 + scale) + shift)


@torch.no_grad()
def test_vision_tower_is_the_models_own_with_shifts_scales_and_gates(clip_folder: str) -> None:
    network, pixels = trained(clip_folder), images()
    found = network.embed_images(pixels, TIMESTEPS)
    modulate(network, TIMESTEPS)
    prepared = prepare_pixels(pixels, PIXELS, network.mean, network.std)
    pooled = network.clip.vision_model(pixel_values=prepared).pooler_output
    torch.testing.assert_close(found, normalize(network.clip.visual_projection(pooled), dim=-1))


@torch.no_grad()
def test_starts_as_the_clip_model_whatever_the_timestep(clip_folder: str, pictures: list[Image.Image]) -> None:
    network, _ = load_step_aware(clip_folder)
    towers = CLIPScorer(clip_folder, device="cpu").towers()
    square = [picture for picture in pictures if picture.size == (PIXELS, PIXELS)]
    for timestep in (0.0, 951.0):
        found = network.embed_images(to_pixels(square[0])[None], torch.tensor([timestep]))
        torch.testing.assert_close(found, towers.embed_images(square), rtol=1e-4, atol=1e-5)
    texts = network.embed_tokens(network.tokenize(PROMPTS))
    torch.testing.assert_close(texts, towers.embed_prompts(PROMPTS), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_trained_one_knows_the_timestep_of_each_row(clip_folder: str) -> None:
    network, pixels = trained(clip_folder), images(1).repeat(4, 1, 1, 1)
    together = network.embed_images(pixels, TIMESTEPS)
    alone = torch.cat([network.embed_images(pixels[:1], timestep[None]) for timestep in TIMESTEPS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_scores_are_differentiable_and_checkpointing_changes_nothing(clip_folder: str) -> None:
    network, grads = trained(clip_folder), []
    network.requires_grad_(True)
    texts = network.embed_tokens(network.tokenize(PROMPTS)).detach()
    for checkpointing in (False, True):
        network.gradient_checkpointing = checkpointing
        pixels = images(4, 40, 56).requires_grad_()
        network.similarity(network.embed_images(pixels, TIMESTEPS), texts).sum().backward()
        grads.append(pixels.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


def folder_of(network: StepAwareCLIP, folder: Path) -> dict[str, str]:
    network.save(folder)
    return {"source": str(folder)}


def released_file(network: StepAwareCLIP, clip_folder: str, folder: Path) -> dict[str, str]:
    torch.save(published(network), folder / "spm.bin")
    return {"source": clip_folder, "weights": str(folder / "spm.bin")}


def lightning_checkpoint(network: StepAwareCLIP, clip_folder: str, folder: Path) -> dict[str, str]:
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": {"generator.network.x": torch.zeros(1), **state}}, folder / "spm.ckpt")
    return {"source": clip_folder, "weights": str(folder / "spm.ckpt")}


def safetensors_file(network: StepAwareCLIP, clip_folder: str, folder: Path) -> dict[str, str]:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "spm.safetensors")
    return {"source": clip_folder, "weights": str(folder / "spm.safetensors")}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["folder", "released", "lightning", "safetensors"])
def test_weights_come_back_from_every_kind_of_file(clip_folder: str, tmp_path: Path, kind: str) -> None:
    network = trained(clip_folder)
    write = {"released": released_file, "lightning": lightning_checkpoint, "safetensors": safetensors_file}
    arguments = folder_of(network, tmp_path) if kind == "folder" else write[kind](network, clip_folder, tmp_path)
    loaded = StepAwareScorer(**arguments, device="cpu").load()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_a_saved_folder_is_a_clip_model_without_the_timestep(
    clip_folder: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    plain(clip_folder).save(tmp_path)
    prompts = ["a cat"] * len(pictures)
    expected = CLIPScorer(clip_folder, device="cpu")(prompts, pictures)
    torch.testing.assert_close(CLIPScorer(str(tmp_path), device="cpu")(prompts, pictures), expected)


def test_as_a_scorer_of_images_they_count_as_finished(
    clip_folder: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    network = trained(clip_folder)
    scorer = StepAwareScorer(**folder_of(network, tmp_path), device="cpu")
    found = scorer(["a cat"] * 2, pictures[:2])
    for score, picture in zip(found, pictures[:2], strict=True):
        embeds = network.embed_images(to_pixels(picture)[None], torch.zeros(1))
        expected = network.similarity(embeds, network.embed_tokens(network.tokenize(["a cat"])))
        torch.testing.assert_close(score, expected[0], rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_there_or_do_not_fit_are_refused(clip_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    tensors = published(trained(clip_folder))
    for change, message in (
        ({"model.head.weight": torch.zeros(1)}, r"tensor 'model.head.weight' is none of a step-aware CLIP"),
        ({"model.t_embedder.mlp.0.weight": torch.zeros(3, 3)}, r"tensor time_embedder.0.weight has shape \(3, 3\)"),
        ({"model.t_embedder.mlp.0.weight": None}, "missing tensor time_embedder.0.weight"),
    ):
        torch.save({name: value for name, value in {**tensors, **change}.items() if value is not None}, path)
        with pytest.raises(InputError, match=message):
            StepAwareScorer(clip_folder, weights=str(path), device="cpu").load()
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(InputError, match=r"x\.bin: it is damaged, or holds more than tensors"):
        StepAwareScorer(clip_folder, weights=str(path), device="cpu").load()
    assert not (Path(clip_folder) / STEP_FILE).exists()
