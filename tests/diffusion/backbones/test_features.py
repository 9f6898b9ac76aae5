"""Features against forward hooks on the untouched network: diffusers' own forward is the oracle."""

from math import prod
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from latentreward.core.contracts import Conditioning, Features
from latentreward.core.errors import InputError
from latentreward.diffusion import DiffusionBackbone
from latentreward.diffusion.backbones.loading import load_weights
from latentreward.reward import DRMHead
from tests.diffusion.backbones.networks import DITS, inputs_of, network_of, tiny_backbone
from tests.marks import rotated_after
from tests.tiny_pipelines import LATENTS, PIXELS, pipeline_folder


def record(module: nn.Module, seen: dict[Any, Any], key: Any) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: seen.__setitem__(key, output))


def unet_oracle(name: str, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[Any, Tensor]:
    """Tap → feature map, and ``temb``, from a full forward pass."""
    unet = load_weights(UNet2DConditionModel, pipeline_folder(name), subfolder="unet")
    seen: dict[Any, Any] = {}
    record(unet.conv_in, seen, 0)
    for number, block in enumerate(unet.down_blocks, start=1):
        last = block.attentions[-1] if getattr(block, "has_cross_attention", False) else block.resnets[-1]
        record(last, seen, number)
    record(unet.mid_block, seen, len(unet.down_blocks) + 1)
    record(unet.time_embedding, seen, "temb")
    side = float(PIXELS)
    added = {
        "text_embeds": conditioning.pooled_prompt_embeds,
        "time_ids": torch.tensor([[side, side, 0, 0, side, side]]).expand(len(latents), 6),
    }
    if name == "sdxl":
        record(unet.add_embedding, seen, "aug")
    with torch.no_grad():
        seen["output"] = unet(latents, timesteps, conditioning.prompt_embeds, added_cond_kwargs=added).sample
    seen["temb"] = seen["temb"] + seen.pop("aug", 0)
    return {key: value[0] if isinstance(value, tuple) else value for key, value in seen.items()}


def dit_oracle(name: str, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[Any, Any]:
    """Tap → (visual tokens, text tokens), and ``temb``, from a full forward pass."""
    dit = load_weights(SD3Transformer2DModel, pipeline_folder(name), subfolder="transformer")
    seen: dict[Any, Any] = {}
    record(dit.pos_embed, seen, "visual")
    record(dit.context_embedder, seen, "text")
    record(dit.time_text_embed, seen, "temb")
    for number, block in enumerate(dit.transformer_blocks, start=1):
        record(block, seen, number)
    with torch.no_grad():
        output = dit(latents, conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, timesteps).sample
    taps = {number: (seen[number][1], seen[number][0]) for number in range(1, len(dit.transformer_blocks) + 1)}
    return {0: (seen["visual"], seen["text"]), "temb": seen["temb"], "output": output, **taps}


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_against_spec(backbone: DiffusionBackbone, features: Features) -> None:
    """What came is what ``feature_spec`` announced."""
    spec = backbone.feature_spec
    assert [t.width for t in spec.visual] == [v.shape[2] for v in features.visual]
    assert [t.grid for t in spec.visual] == list(features.visual_grids)
    assert [prod(t.grid) for t in spec.visual] == [v.shape[1] for v in features.visual]
    assert [(*t.grid, t.width) for t in spec.text] == [tuple(t.shape[1:]) for t in features.text]
    assert spec.temb_dim == features.temb.shape[1]
    assert spec.pooled_text_dim == features.pooled_text.shape[1]


UNET_TAPS = [None, (0, 2), (1,), (0,), (3,)]


@pytest.mark.parametrize("taps", rotated_after(2, [(taps,) for taps in UNET_TAPS]), ids=str)
@pytest.mark.parametrize("name", ["sd15", "sd15_four_levels", "sdxl"])
def test_unet_features_equal_hooks(name: str, taps: tuple[int, ...] | None) -> None:
    backbone = tiny_backbone(name, visual_taps=taps)
    latents, timesteps, conditioning = inputs_of(backbone)
    expected = unet_oracle(name, latents, timesteps, conditioning)
    with torch.no_grad():
        features = backbone(latents, timesteps, conditioning)
    for tap, tokens, grid in zip(backbone.visual_taps, features.visual, features.visual_grids, strict=True):
        exact(tokens.transpose(1, 2).unflatten(2, grid), expected[tap])
    exact(features.temb, expected["temb"])
    exact(features.text[0], conditioning.prompt_embeds)
    exact(features.pooled_text, conditioning.pooled_prompt_embeds)
    check_against_spec(backbone, features)


@pytest.mark.parametrize(("visual", "text"), [((1, 3), (1, 3)), ((0, 4), ()), ((1,), (0, 3)), ((0,), (0,))], ids=str)
@pytest.mark.parametrize("name", DITS)
def test_dit_features_equal_hooks(name: str, visual: tuple[int, ...], text: tuple[int, ...]) -> None:
    backbone = tiny_backbone(name, visual_taps=visual, text_taps=text, tuning="frozen")
    latents, timesteps, conditioning = inputs_of(backbone)
    expected = dit_oracle(name, latents, timesteps, conditioning)
    with torch.no_grad():
        features = backbone(latents, timesteps, conditioning)
    for tap, tokens in zip(visual, features.visual, strict=True):
        exact(tokens, expected[tap][0])
    for tap, tokens in zip(text, features.text, strict=True):
        exact(tokens, expected[tap][1])
    exact(features.temb, expected["temb"])
    exact(features.pooled_text, conditioning.pooled_prompt_embeds)
    check_against_spec(backbone, features)


@pytest.mark.parametrize("name", ["sd15", "sd15_four_levels", "sdxl", *DITS])
def test_the_output_map_is_the_networks_prediction(name: str) -> None:
    taps = {"visual_taps": (4,), "text_taps": ()} if name in DITS else {"visual_taps": (1,)}  # of a transformer the end
    backbone = tiny_backbone(name, output_map=True, tuning="frozen", **taps)
    inputs = inputs_of(backbone, shape=(LATENTS, LATENTS + 2))
    with torch.no_grad():
        exact(backbone(*inputs).output, (dit_oracle if name in DITS else unet_oracle)(name, *inputs)["output"])


@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_every_trained_weight_has_a_gradient_through_the_output_map(name: str) -> None:
    options = {"visual_taps": (2,), "text_taps": ()} if name == "sd35" else {}
    backbone = tiny_backbone(name, output_map=True, tuning="full", **options)
    head = DRMHead(backbone.feature_spec, widths=(8,), groups=4)
    backbone.drop_text_taps()
    backbone.drop_time_embedding()
    head(backbone(*inputs_of(backbone))).sum().backward()
    weights = network_of(backbone).named_parameters()
    assert not [key for key, weight in weights if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_uncond_rides_along_in_the_same_pass(name: str) -> None:
    backbone = tiny_backbone(name)
    latents, timesteps, conditioning = inputs_of(backbone)
    empty = conditioning.select([0])
    calls = []
    network = network_of(backbone)
    first = network.conv_in if hasattr(network, "conv_in") else network.pos_embed
    first.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        features = backbone(latents, timesteps, conditioning, empty)
        assert len(calls) == 1
        alone = backbone(latents, timesteps, conditioning)
        of_empty = backbone(latents, timesteps, empty.select([0, 0]))
    assert alone.uncond is None
    for got, want in ((features, alone), (features.uncond, of_empty)):
        for a, b in zip((*got.visual, *got.text, got.temb), (*want.visual, *want.text, want.temb), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_rows_do_not_see_each_other(name: str) -> None:
    backbone = tiny_backbone(name)
    latents, timesteps, conditioning = inputs_of(backbone, batch=3)
    order = [2, 0, 1]
    with torch.no_grad():
        straight = backbone(latents, timesteps, conditioning)
        turned = backbone(latents[order], timesteps[order], conditioning.select(order))
    for a, b in zip(straight.visual, turned.visual, strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-5, atol=1e-5)


def test_each_distinct_prompt_is_encoded_once() -> None:
    backbone = tiny_backbone("sd15")
    sizes = []
    backbone.text_encoder.text_encoder.register_forward_hook(lambda _m, _i, out: sizes.append(len(out[0])))
    encoded = backbone.encode_prompts(["a", "b", "a", "a"])
    assert sizes == [2]
    exact(encoded.prompt_embeds[0], encoded.prompt_embeds[3])
    exact(encoded.pooled_prompt_embeds, backbone.text_encoder(["a", "b", "a", "a"]).pooled_prompt_embeds)


def test_pooled_text_of_t5_is_the_mean_of_its_tokens() -> None:
    backbone = tiny_backbone("sd35", pooled_text="t5")
    latents, timesteps, conditioning = inputs_of(backbone)
    features = backbone(latents, timesteps, conditioning)
    clip = backbone.text_encoder.clip_length
    torch.testing.assert_close(features.pooled_text, conditioning.prompt_embeds[:, clip:].mean(dim=1))
    check_against_spec(backbone, features)


def test_latents_with_other_channels_are_refused() -> None:
    backbone = tiny_backbone("sd35")
    _, timesteps, conditioning = inputs_of(backbone)
    with pytest.raises(InputError, match=r"latents have 16 channels, but this backbone takes .*4 channels"):
        backbone(torch.randn(2, 16, LATENTS, LATENTS), timesteps, conditioning)


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        *(("sd15", {"visual_taps": taps}, "visual_taps=") for taps in ((), (2, 1), (1, 1), (-1,), (6,))),
        ("sd15", {"text_taps": (1,)}, "text_taps="),
        ("sd35", {"visual_taps": (5,)}, "visual_taps="),
        ("sd35", {"num_layers": 2}, "visual_taps="),
        ("sd35", {"num_layers": 9}, "num_layers=9"),
        ("sd35", {"text_taps": (4,)}, "text_taps="),
        ("sd35_no_t5", {"pooled_text": "t5"}, "pooled_text='t5'"),
        ("sd35", {"pooled_text": "t5", "load_t5": False}, "load_t5"),
    ],
)
def test_bad_taps_are_refused(name: str, taps: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_backbone(name, **taps)


def test_a_backbone_with_weights_of_its_own_is_not_shared() -> None:
    """It may have been built without values: only the network and the text encoder are replaced."""
    backbone, other = (tiny_backbone("sd35") for _ in range(2))
    assert backbone.with_network(other.transformer, other.text_encoder) is not None
    backbone.projection = nn.Linear(2, 2)
    assert backbone.with_network(other.transformer, other.text_encoder) is None
