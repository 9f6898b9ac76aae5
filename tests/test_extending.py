"""docs/extending.md: its examples, run as a user would run them."""

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from latentreward.contracts import Conditioning, LatentSpace
from latentreward.heads import CLIPProjectionHead, GatedQFormerHead
from latentreward.scoring import RewardModel
from tests.processes import Forked, finish

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files in an empty folder."""
    blocks = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    assert {name for name, _ in blocks} == {"toy_video.py", "toy_video.yaml", "flux_backbone.py"}
    return tmp_path


def fit(folder: Path, *options: str) -> Forked:
    return finish(["fit", "--config=toy_video.yaml", *options], cwd=folder)


def test_video_example_trains_from_yaml_alone(folder: Path) -> None:
    run = fit(folder, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false")
    assert run.returncode == 0, run.stderr[-3000:]
    (checkpoint,) = folder.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2


def test_wrong_setting_of_the_example_is_one_line(folder: Path) -> None:
    run = fit(folder, "--model.backbone.visual_taps=[1,4]")
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("latentreward: error: visual_taps=[1, 4] reaches block 4")


@pytest.fixture
def flux(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("flux_backbone", folder / "flux_backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_flux(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 4, 2),
    ).eval()


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_flux_features_equal_hooks_on_the_untouched_network(flux: ModuleType, guidance_embeds: bool) -> None:
    whole = tiny_flux(guidance_embeds)
    backbone = flux.FluxBackbone(copy.deepcopy(whole), LatentSpace(4, 8, 0.3611, 0.1159), taps=(1, 2), guidance=2.5)
    latents, timesteps = torch.randn(2, 4, 6, 8), torch.tensor([300.0, 800.0])
    conditioning = Conditioning(torch.randn(2, 5, 12), torch.randn(2, 10))
    seen = []
    for block in whole.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        whole(
            FluxPipeline._pack_latents(latents, *latents.shape),
            conditioning.prompt_embeds,
            conditioning.pooled_prompt_embeds,
            timesteps / 1000,
            FluxPipeline._prepare_latent_image_ids(2, 3, 4, latents.device, latents.dtype),
            torch.zeros(5, 3),
            torch.full((2,), 2.5) if guidance_embeds else None,
        )
        features = backbone(latents, timesteps, conditioning)
    assert features.visual_grids == ((3, 4),) * 2
    for tap, (text, visual) in enumerate(seen[:2]):
        torch.testing.assert_close(features.visual[tap], visual)
        torch.testing.assert_close(features.text[tap], text)


@pytest.mark.parametrize("head", [GatedQFormerHead, CLIPProjectionHead])
def test_flux_has_no_unused_weights(flux: ModuleType, head: type) -> None:
    backbone = flux.FluxBackbone(tiny_flux(False), LatentSpace(4, 8, 0.3611, 0.1159), taps=(1, 2))
    model = RewardModel(backbone, head(backbone.feature_spec))
    if not model.head.reads_text:
        backbone.drop_text_taps()
    conditioning = Conditioning(torch.randn(2, 5, 12), torch.randn(2, 10))
    uncond = conditioning.select([0]) if model.head.needs_uncond else None
    model(torch.randn(2, 4, 6, 8), torch.tensor([300.0, 800.0]), conditioning, uncond).sum().backward()
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not unused
