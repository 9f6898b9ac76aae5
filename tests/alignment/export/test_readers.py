"""An exported adapter adds alpha / rank · B A in every program that reads it, also where the program knows no alpha."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentreward.alignment import Policy, TrainedLoRA, write_kohya
from latentreward.apps.generation import load_lora
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from tests.diffusion.families.twins import Twin, one_per_family
from tests.marks import slow_after

RANK = 2
ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
FLUX1 = rf"(single_)?transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
COMFY = {
    "sd3": rf"transformer_blocks\.\d+\.({ATTENTION}|attn2\.(to_[qkv]|to_out\.0))",
    **dict.fromkeys(("flux1", "flux1_kontext"), FLUX1),
    "z_image": r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)",
    "qwen_image": r"transformer_blocks\.\d+\..+",
}
"""Families whose LoRAs in diffusers' names ComfyUI reads, and the layers that it knows under ``transformer.``.

As in ComfyUI's ``model_lora_keys_unet`` of comfy/lora.py, and the maps of names ``mmdit_to_diffusers``,
``flux_to_diffusers`` and ``z_image_to_diffusers`` of comfy/utils.py. Of U-Nets it knows ``attn1.processor.to_q``, and
of Lumina-Image 2.0 ``attention.to_q``: neither is diffusers' name.
"""


def adapter(twin: Twin, network: nn.Module, alpha: float) -> TrainedLoRA:
    """Random A and B for the layers that the family adapts."""
    family, draw = twin.source().resolve_family(), torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(family.lora_targets)) and name not in family.idle:
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=draw)
            weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=draw)
    return TrainedLoRA(weights, LoRA(RANK, alpha), family)


def wanted(lora: TrainedLoRA) -> dict[str, Tensor]:
    """What each layer's weight gets added."""
    return {layer: lora.settings.alpha / RANK * up @ down for layer, (down, up) in lora.pairs.items()}


def added(network: nn.Module) -> dict[str, Tensor]:
    """What peft's layers of a network add to the layers' weights."""
    layers = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, LoraLayer))
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(layer.active_adapters[0]).detach()
        for name, layer in layers
    }


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, update in want.items():
        torch.testing.assert_close(found[name], update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", slow_after(1, [2.0 * RANK, RANK, RANK / 2, 3.0]))
@pytest.mark.parametrize("twin", slow_after(2, one_per_family()), ids=lambda twin: twin.family)
def test_every_reader_adds_the_same_update(twin: Twin, alpha: float, tmp_path: Path) -> None:
    network = twin.source().resolve_family().load_network()
    lora = adapter(twin, network, alpha)
    want, file, folder = wanted(lora), lora.write_diffusers(tmp_path / "diffusers"), lora.write_peft(tmp_path / "peft")
    plain = load_file(file)
    start = f"{lora.family.part}."
    known_by_a_and_b = {
        name.removeprefix(start).removesuffix(".lora_A.weight"): plain[name.replace("lora_A", "lora_B")] @ down
        for name, down in plain.items()
        if ".lora_A." in name
    }
    same(known_by_a_and_b, want)  # ComfyUI takes alpha from tensors ".alpha", else 1 as the scale
    if twin.family in COMFY:
        assert all(re.fullmatch(COMFY[twin.family], layer) for layer in want)
    for path in (file, folder):
        policy = Policy(twin.source().resolve_family().load_network(), lora.family)
        load_lora(policy, path)
        same(added(policy.network), want)
    same(added(PeftModel.from_pretrained(network, folder)), want)
    pipeline = twin.pipeline()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    same(added(getattr(pipeline, lora.family.part)), want)


@pytest.mark.parametrize("alpha", slow_after(1, [2.0 * RANK, RANK, RANK / 2]))
@pytest.mark.parametrize("twin", one_per_family(), ids=lambda twin: twin.family)
def test_kohyas_file_adds_the_same_update_by_its_own_rule(twin: Twin, alpha: float, tmp_path: Path) -> None:
    """Scripts and ComfyUI scale B A by alpha / (rows of A)."""
    lora = adapter(twin, twin.source().resolve_family().load_network(), alpha)
    try:
        file = load_file(write_kohya(lora, tmp_path))
    except InputError as error:
        assert "has no names for" in str(error) and twin.family not in ("sd", "wan21")
        return
    want, named = (
        wanted(lora),
        lora.family.kohya_layers({layer: (up, down) for layer, (down, up) in lora.pairs.items()}),
    )
    total = {}
    for key in (name.removesuffix(".alpha") for name in file if name.endswith(".alpha")):
        down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
        total[key] = file[f"{key}.alpha"] / len(down) * up @ down
    assert len(total) == len(named)
    found, expected = (sum(update.double().sum() for update in group.values()) for group in (total, want))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_a_file_of_diffusers_whose_alpha_stands_in_the_metadata_alone_has_its_strength(
    alpha: float, tmp_path: Path
) -> None:
    from diffusers.loaders import SD3LoraLoaderMixin

    (twin,) = (twin for twin in one_per_family() if twin.family == "sd3")
    lora = adapter(twin, twin.source().resolve_family().load_network(), alpha)
    metadata = {"r": RANK, "lora_alpha": alpha, "target_modules": ["to_q"], "rank_pattern": {}, "alpha_pattern": {}}
    SD3LoraLoaderMixin.save_lora_weights(tmp_path, lora.weights, transformer_lora_adapter_metadata=metadata)
    policy = Policy(twin.source().resolve_family().load_network(), lora.family)
    load_lora(policy, tmp_path)
    same(added(policy.network), wanted(lora))


def test_alpha_as_a_tensor_is_the_strength_too(tmp_path: Path) -> None:
    (twin,) = (twin for twin in one_per_family() if twin.family == "sd3")
    lora = adapter(twin, twin.source().resolve_family().load_network(), 4.0)
    tensors = {f"transformer.{name}": tensor for name, tensor in lora.weights.items()}
    tensors |= {f"transformer.{layer}.alpha": torch.tensor(4.0) for layer in lora.pairs}
    save_file(tensors, tmp_path / "lora.safetensors")
    policy = Policy(twin.source().resolve_family().load_network(), lora.family)
    load_lora(policy, tmp_path)
    same(added(policy.network), wanted(lora))
