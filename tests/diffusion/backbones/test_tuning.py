"""What trains: every parameter that does gets a gradient; dtypes; checkpointing; compiled blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentreward.core.contracts import Features
from latentreward.core.errors import InputError
from latentreward.diffusion import DiffusionBackbone, LoRA
from latentreward.diffusion.backbones.tuning import warn_of_layers
from latentreward.reward import CLIPProjectionHead, GatedQFormerHead
from tests.alignment.policies.alignment import tiny_source
from tests.diffusion.backbones.networks import inputs_of, network_of, tiny_backbone
from tests.marks import rotated_after, slow_after

PROMPTS = ["a cat", "two dogs"]


def total(features: Features) -> Tensor:
    """A number that every feature changes."""
    tensors = (*features.visual, *features.text, features.pooled_text, features.temb)
    return sum((tensor.float() ** 2).mean() for tensor in tensors)


def score(backbone: DiffusionBackbone, head: nn.Module, prompts: list[str] = PROMPTS) -> Tensor:
    latents, timesteps, _ = inputs_of(backbone, len(prompts))
    uncond = backbone.encode_prompts([""]) if head.needs_uncond else None
    return head(backbone(latents, timesteps, backbone.encode_prompts(prompts), uncond))


def without_gradient(*modules: nn.Module) -> list[str]:
    return [
        name
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]


UNET_CASES = [
    ("sd15_four_levels", {"visual_taps": None}),
    ("sd15_four_levels", {"visual_taps": (1,)}),
    ("sd15_four_levels", {"visual_taps": (0, 3)}),
    ("sd15_four_levels", {"visual_taps": (4,)}),
    ("sdxl", {"visual_taps": None}),
    ("sdxl", {"visual_taps": (1, 2)}),
    ("sdxl", {"visual_taps": (3,)}),
]
DIT_CASES = [
    (name, {"visual_taps": visual, "text_taps": text, "num_layers": layers})
    for name, visual, text, layers in [
        ("sd3", (1, 3), (1, 3), None),
        ("sd3", (1,), (3,), None),
        ("sd35", (1, 3), (1, 3), None),
        ("sd35", (1, 3), (1,), None),  # text ends earlier
        ("sd35", (1,), (3,), None),  # visual ends earlier
        ("sd35", (1,), (2,), None),  # ... in a block with two attentions
        ("sd35", (4,), (), None),  # the last block of the whole network
        ("sd35", (1,), (1,), 3),  # blocks kept that nobody reads
        ("sd35", (0,), (0,), None),
    ]
]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("name", "taps"), rotated_after(2, UNET_CASES + DIT_CASES), ids=str)
def test_no_trained_parameter_is_left_without_gradient(name: str, taps: dict[str, Any], tuning: str) -> None:
    if tuning == "lora" and taps["visual_taps"] == (0,):
        pytest.skip("no attention is read")
    backbone = tiny_backbone(name, tuning=tuning, text_encoder_tuning=tuning, **taps)
    head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
    score(backbone, head).sum().backward()
    assert without_gradient(backbone, head) == []
    trained = [n for n, parameter in network_of(backbone).named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained) == (tuning == "lora")


@pytest.mark.parametrize(
    ("name", "taps", "options"),
    [
        *(("sdxl", (1,), {}), ("sdxl", (0,), {}), ("sd15", (0,), {})),
        *(("sd35", (0,), {"text_taps": (), "pooled_text": pooled}) for pooled in ("clip", "t5")),
    ],
)
def test_no_trained_parameter_is_left_without_gradient_by_lrm_on_early_taps(
    name: str, taps: tuple[int, ...], options: dict[str, Any]
) -> None:
    backbone = tiny_backbone(name, tuning="full", text_encoder_tuning="full", visual_taps=taps, **options)
    head = CLIPProjectionHead(backbone.feature_spec, project_text=name != "sdxl")
    backbone.drop_text_taps()
    backbone.drop_time_embedding()
    score(backbone, head).sum().backward()
    assert without_gradient(backbone, head) == []
    assert any(parameter.requires_grad for parameter in network_of(backbone).parameters())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_lora_starts_as_the_network_itself(name: str) -> None:
    plain, adapted = tiny_backbone(name, tuning="frozen"), tiny_backbone(name, tuning="lora", lora=LoRA(rank=2))
    latents, timesteps, conditioning = inputs_of(plain)
    for a, b in zip(
        plain(latents, timesteps, conditioning).visual, adapted(latents, timesteps, conditioning).visual, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_lora_settings_take_effect() -> None:
    lora = LoRA(rank=3, alpha=6.0, dropout=0.25, target_modules=("to_v",))
    backbone = tiny_backbone("sd35", lora=lora)
    layers = {name: module for name, module in network_of(backbone).named_modules() if hasattr(module, "lora_A")}
    assert {name.rsplit(".", 1)[1] for name in layers} == {"to_v"}
    for layer in layers.values():
        assert layer.lora_A["default"].out_features == 3
        assert layer.scaling["default"] == 2.0
        assert layer.lora_dropout["default"].p == 0.25


def test_a_name_that_no_layer_has_is_told() -> None:
    with pytest.warns(UserWarning, match=r"lora.target_modules: no layer of SD3Transformer2DModel is named to_kk$"):
        tiny_backbone("sd35", lora=LoRA(target_modules=("to_v", "to_kk")))
    with pytest.warns(UserWarning, match=r"lora.target_modules: no layer of SD3Transformer2DModel is named to_kk$"):
        tiny_source("sd35", lora=LoRA(2, 4.0, target_modules=("to_v", "to_kk"))).load()
    network, own = nn.Sequential(FusedAttention()), type("Own", (), {"lora_targets": ("to_q", "qkv_proj", "qkv")})()
    with pytest.warns(UserWarning, match=r"^family: Own.lora_targets: no layer of Sequential is named qkv$"):
        warn_of_layers(network, LoRA(), own)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.to_out = nn.Linear(2, 6), nn.ModuleList([nn.Linear(2, 2)])


def gradients(backbone: DiffusionBackbone) -> dict[str, Tensor]:
    torch.manual_seed(1)
    latents, timesteps, conditioning = inputs_of(backbone)
    total(backbone(latents, timesteps, conditioning)).backward()
    return {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", rotated_after(1, ["sd15", "sdxl", "sd35"]))
def test_gradient_checkpointing_changes_no_gradient(name: str, tuning: str) -> None:
    torch.manual_seed(0)
    plain = gradients(tiny_backbone(name, tuning=tuning))
    torch.manual_seed(0)
    backbone = tiny_backbone(name, tuning=tuning, gradient_checkpointing=True)
    runs = []
    block = list(backbone.blocks())[-1]
    inner = block.resnets[-1] if hasattr(block, "resnets") else block.attn
    inner.register_forward_pre_hook(lambda *_: runs.append(1))
    recomputed = gradients(backbone)
    assert len(runs) == 2  # forward, and again in the backward pass
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("tuning", "autocast"), rotated_after(1, [("full", True), ("lora", True), ("lora", False)]))
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_bfloat16_storage_keeps_what_trains_in_float32(name: str, tuning: str, autocast: bool) -> None:
    backbone = tiny_backbone(name, tuning=tuning, text_encoder_tuning="frozen", frozen_dtype="bfloat16")
    for parameter in [*network_of(backbone).parameters(), *backbone.text_encoder.parameters()]:
        if parameter.requires_grad or tuning != "full":
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    heads = [GatedQFormerHead(backbone.feature_spec, num_heads=2), CLIPProjectionHead(backbone.feature_spec)]
    for head in heads:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = score(backbone, head)
        assert value.isfinite().all()
        value.float().sum().backward()
        trained = [p for p in [*backbone.parameters(), *head.parameters()] if p.grad is not None]
        assert trained
        assert all(parameter.grad.dtype == torch.float32 for parameter in trained)


@pytest.mark.parametrize("name", slow_after(1, ["sd15", "sd35"]))
def test_attention_backend(name: str) -> None:
    plain, native = tiny_backbone(name), tiny_backbone(name, attention_backend="native")
    latents, timesteps, conditioning = inputs_of(plain)
    torch.testing.assert_close(
        native(latents, timesteps, conditioning).visual[-1], plain(latents, timesteps, conditioning).visual[-1]
    )
    with pytest.raises(InputError, match="attention_backend='no_such_backend'"):
        tiny_backbone(name, attention_backend="no_such_backend")
    line = r"attention_backend='_native_math': \w+ calls PyTorch's attention itself.*remove attention_backend"
    with pytest.raises(InputError, match=line):
        tiny_backbone(name, attention_backend="_native_math")
