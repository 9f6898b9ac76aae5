"""SD3's adapters under the names that sd-scripts writes: keys, sizes and alphas as facts, updates as numbers."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentreward.alignment import TrainedLoRA, write_kohya
from latentreward.alignment.export.lora import KOHYA_FILE as FILE
from latentreward.diffusion import LoRA
from latentreward.diffusion.families.sd3 import StableDiffusion3
from tests.alignment.export.mmdit import linears, updates_of_sd3
from tests.diffusion.families.made_configs import MadeConfigs
from tests.tiny_pipelines import sd3_transformer

RANK, ALPHA = 2, 3.0


def adapter(transformer: SD3Transformer2DModel, ending: tuple[str, ...] = ("",)) -> TrainedLoRA:
    """Random A and B for all linear layers and convolutions whose names end so."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(ending):
            outputs, *inputs = layer.weight.shape
            ones = (1,) * (len(inputs) - 1)
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, *inputs, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK, *ones, generator=generator)
    return TrainedLoRA(weights, LoRA(RANK, ALPHA), StableDiffusion3(MadeConfigs({})))


def written(lora: TrainedLoRA, folder: Path) -> dict[str, Tensor]:
    return load_file(write_kohya(lora, folder))


def test_keys_are_those_of_sd_scripts(tmp_path: Path) -> None:
    """``LORA_PREFIX_SD3`` and ``lora_name`` of networks/lora_sd3.py, ``LoRAModule`` of networks/lora_flux.py."""
    file = written(adapter(sd3_transformer(sd35=True)), tmp_path)
    layers = {*linears(4, dual=(0, 1)), "x_embedder.proj"}
    names = {f"lora_unet_{layer.replace('.', '_')}" for layer in layers}
    assert set(file) == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert {
        "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha",
        "lora_unet_joint_blocks_3_context_block_attn_qkv.alpha",
    } <= {*file}
    with safe_open(tmp_path / FILE, "pt") as opened:
        told = opened.metadata()
    assert told["ss_network_module"] == "networks.lora_sd3"
    assert (told["ss_network_dim"], float(told["ss_network_alpha"])) == (str(RANK), ALPHA)


def test_queries_keys_and_values_are_one_layer(tmp_path: Path) -> None:
    """``LoRANetwork.state_dict`` under ``split_qkv``: stacked A, and B of blocks on the diagonal.

    A loader divides alpha by the rows of A, of which there are three times as many.
    """
    lora = adapter(sd3_transformer(sd35=True))
    file, key = written(lora, tmp_path), "lora_unet_joint_blocks_1_x_block_attn_qkv"
    down, up, alpha = (file[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (3 * RANK, 24) and up.shape == (3 * 24, 3 * RANK) and alpha == 3 * ALPHA
    for part, letter in enumerate("qkv"):
        own = {side: lora.weights[f"transformer_blocks.1.attn.to_{letter}.lora_{side}.weight"] for side in "AB"}
        rows, columns = slice(24 * part, 24 * (part + 1)), slice(RANK * part, RANK * (part + 1))
        assert torch.equal(down[columns], own["A"]) and torch.equal(up[rows, columns], own["B"])
        up[rows, columns] = 0
    assert not up.any()
    assert file["lora_unet_joint_blocks_1_x_block_attn_proj.alpha"] == ALPHA


@pytest.mark.parametrize("ending", [("",), ("to_q", "to_v", "add_k_proj"), ("to_v",)])
@pytest.mark.parametrize("sd35", [True, False])
def test_updates_are_those_of_the_adapter(ending: tuple[str, ...], sd35: bool, tmp_path: Path) -> None:
    transformer = sd3_transformer(sd35)
    lora = adapter(transformer, ending)
    updates = updates_of_sd3(transformer, written(lora, tmp_path))
    for name, weight in transformer.named_parameters():
        layer, expected = name.removesuffix(".weight"), torch.zeros_like(weight)
        if f"{layer}.lora_A.weight" in lora.weights and name.endswith(".weight"):
            down, up = (lora.weights[f"{layer}.lora_{side}.weight"].flatten(1) for side in "AB")
            expected = (ALPHA / RANK * up @ down).reshape(weight.shape)
        torch.testing.assert_close(updates[name], expected, msg=lambda text, name=name: f"{name}: {text}")
