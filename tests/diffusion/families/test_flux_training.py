"""Modules of FLUX.1 and FLUX.2 without gradient are exactly those that the families name as unread."""

import pytest
import torch

from latentreward.core.registry import create_backbone
from tests.diffusion.families.twins import PROMPTS, TWINS, noise_for
from tests.marks import rotated_after

TAPS = [([2, 3], [3]), ([4], []), ([2], []), ([1], [2]), ([0], [1]), ([0], []), ([0], [0])]


@pytest.mark.parametrize("name", rotated_after(1, ["flux1_dev", "klein_base", "flux1_schnell"]))
@pytest.mark.parametrize(("visual", "text"), TAPS)
def test_unread_modules_are_those_without_gradient(name: str, visual: list[int], text: list[int]) -> None:
    twin = TWINS[name]
    backbone = create_backbone(
        twin.backbone, source=twin.folder, num_layers=4, visual_taps=visual, text_taps=text, tuning="full"
    )
    frozen = {key for key, value in backbone.transformer.named_parameters() if not value.requires_grad}
    backbone.transformer.requires_grad_(True)
    latents = noise_for(backbone.family.latent_shape(*twin.size))
    features = backbone(latents, torch.tensor([300.0, 800.0]), backbone.encode_prompts(PROMPTS))
    sum(value.pow(3).sum() for value in (*features.visual, *features.text, features.temb)).backward()
    unread = {
        key for key, value in backbone.transformer.named_parameters() if value.grad is None or not value.grad.any()
    }
    assert unread == frozen
