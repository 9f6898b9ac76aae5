"""Names and shapes of the published DiNa-LRM at its real size, without memory: everything lives on the meta device."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from latentreward.core.contracts import LatentSpace
from latentreward.diffusion import FlowMatching, LoRA, SD3DiTBackbone
from latentreward.diffusion.backbones.tuning import tune
from latentreward.reward import GatedQFormerHead
from tests.golden.catalogue import ROOT

SIZES = sorted((ROOT / "dina").glob("real_sizes_sd35m_12layers.json"))
LAYERS, TAPS = 12, (4, 8, 12)


@pytest.fixture(scope="module")
def backbone() -> SD3DiTBackbone:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
        return SD3DiTBackbone(
            transformer, FlowMatching(), LatentSpace(16, 8, 1.5305, 0.0609), LAYERS, visual_taps=TAPS, text_taps=TAPS
        )


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_head(path: Path, backbone: SD3DiTBackbone) -> None:
    with torch.device("meta"):
        head = GatedQFormerHead(backbone.feature_spec)
    golden = json.loads(path.read_text())
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == golden["head"]
    assert sum(parameter.numel() for parameter in head.parameters()) == golden["totals"]["head_params"]


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_adapters(path: Path, backbone: SD3DiTBackbone) -> None:
    golden = json.loads(path.read_text())
    with torch.device("meta"):
        tune(backbone.transformer, "lora", LoRA(), backbone.unread())
    adapters = {
        f"base_model.model.{name.replace('.default.', '.')}": list(parameter.shape)
        for name, parameter in backbone.transformer.named_parameters()
        if parameter.requires_grad
    }
    assert adapters == golden["lora_adapter"]
