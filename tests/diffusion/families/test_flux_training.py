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


@pytest.mark.parametrize("name", ["flux1_dev", "klein_base"])
def test_every_adapter_gets_a_gradient(name: str) -> None:
    twin = TWINS[name]
    policy = twin.source().load()
    singles = [key for key, value in policy.named_parameters() if value.requires_grad and ".single_" in key]
    assert len(singles) == {"flux1_dev": 12, "klein_base": 8}[name]
    for key, value in policy.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(0))
    latents = noise_for(policy.latent_shape(*twin.size)).requires_grad_()
    policy.predict(latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS)).square().mean().backward()
    trained = [value for value in policy.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.isfinite().all() and value.grad.any() for value in trained)
    assert latents.grad is not None
    assert latents.grad.ne(0).float().mean() > 0.99
