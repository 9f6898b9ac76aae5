"""The output map: the untouched network's prediction where no block is left out, and its gradient."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from latentreward.diffusion.backbones.loading import load_weights
from latentreward.reward import DRMHead
from tests.diffusion.backbones.networks import DITS, inputs_of, network_of, tiny_backbone
from tests.tiny_pipelines import LATENTS, PIXELS, pipeline_folder


@pytest.mark.parametrize("shape", [(LATENTS, LATENTS), (LATENTS, LATENTS + 2)], ids=str)
@pytest.mark.parametrize("name", ["sd15", "sd15_four_levels", "sdxl"])
def test_unet_map_is_the_networks_prediction(name: str, shape: tuple[int, int]) -> None:
    backbone = tiny_backbone(name, visual_taps=(1,), output_map=True, tuning="frozen", text_encoder_tuning="frozen")
    latents, timesteps, conditioning = inputs_of(backbone, shape=shape)
    unet = load_weights(UNet2DConditionModel, pipeline_folder(name), subfolder="unet")
    side = float(PIXELS)
    added = {
        "text_embeds": conditioning.pooled_prompt_embeds,
        "time_ids": torch.tensor([[side, side, 0, 0, side, side]]).expand(len(latents), 6),
    }
    with torch.no_grad():
        features = backbone(latents, timesteps, conditioning)
        expected = unet(latents, timesteps, conditioning.prompt_embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(features.output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DITS)
def test_dit_map_is_the_networks_prediction(name: str) -> None:
    depth = len(load_weights(SD3Transformer2DModel, pipeline_folder(name), subfolder="transformer").transformer_blocks)
    backbone = tiny_backbone(name, visual_taps=(depth,), text_taps=(), output_map=True, tuning="frozen")
    latents, timesteps, conditioning = inputs_of(backbone, shape=(LATENTS, LATENTS // 2))
    dit = load_weights(SD3Transformer2DModel, pipeline_folder(name), subfolder="transformer")
    with torch.no_grad():
        features = backbone(latents, timesteps, conditioning)
        expected = dit(latents, conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, timesteps).sample
    torch.testing.assert_close(features.output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_every_trained_weight_of_the_network_has_a_gradient(name: str) -> None:
    options = {"visual_taps": (2,), "text_taps": ()} if name == "sd35" else {}
    backbone = tiny_backbone(name, output_map=True, tuning="full", **options)
    head = DRMHead(backbone.feature_spec, widths=(8,), groups=4)
    backbone.drop_text_taps()
    backbone.drop_time_embedding()
    head(backbone(*inputs_of(backbone))).sum().backward()
    network = network_of(backbone)
    without = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without
