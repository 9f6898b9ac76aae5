"""Scoring in bfloat16 on every family: which layers are converted, and what stays exact."""

import re

import pytest
import torch

from latentreward.core.registry import create_backbone
from latentreward.diffusion import DiffusionBackbone
from latentreward.reward.scoring.precision import halve_products, is_halved
from tests.diffusion.families.twins import PROMPTS, TWINS, Twin, every_network, noise_for

OF_TOKENS = re.compile(
    r"(^|\.)(attn\d?|(self_)?attention|ff|ff_context|ff_[it]|ffn|feed_forward|(img_|txt_)?mlp|proj_mlp|proj_out)(\.|$)"
)
"""Attention and feed-forward layers, which every token passes; FLUX.1's single blocks have proj_mlp and proj_out.

SD3's backbone has an output layer proj_out, which it never runs.
"""


def backbone_of(twin: Twin) -> DiffusionBackbone:
    taps = [1, 2, twin.layers]
    return create_backbone(twin.backbone, source=twin.folder, visual_taps=taps, text_taps=[1], tuning="frozen").eval()


@every_network
@torch.no_grad()
def test_only_attention_and_feed_forward_layers_are_rounded(twin: Twin) -> None:
    backbone, levels = backbone_of(twin), torch.tensor([301.7, 803.3])
    layers = [name for name, module in backbone.transformer.named_modules() if is_halved(name, module)]
    assert layers and [name for name in layers if not OF_TOKENS.search(name)] == []
    latents = noise_for(twin.source().resolve_family().latent_shape(*twin.size))
    conditioning = backbone.encode_prompts(PROMPTS)
    exact = backbone.read(latents, levels, conditioning)
    halve_products(backbone.transformer)
    found = backbone.read(latents, levels, conditioning)
    assert torch.equal(found.temb, exact.temb)
    for one, other in zip(found.visual, exact.visual, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() / other.norm() < 0.02


@pytest.mark.parametrize("name", ["flux1_dev", "klein_base", "wan21", "hidream"])
def test_attention_of_accelerators_gets_one_type(name: str) -> None:
    """On the device meta, where layers choose their types as on a GPU."""
    backbone = backbone_of(TWINS[name])
    latents = noise_for(backbone.family.latent_shape(*TWINS[name].size))
    conditioning = backbone.encode_prompts(PROMPTS)
    halve_products(backbone.transformer)
    backbone.transformer.to("meta")
    features = backbone.read(latents.to("meta"), torch.tensor([300.0, 800.0], device="meta"), conditioning.to("meta"))
    assert {visual.dtype for visual in features.visual} == {torch.float32}
