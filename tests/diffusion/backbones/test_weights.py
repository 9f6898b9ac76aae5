"""Weights are mapped from safetensors, and only those that stay are read, straight into their final types."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from latentreward.alignment import PolicySource
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.weights import (
    assign,
    load_weights,
    map_model,
    read_weights,
    reading_later,
    settle,
    settling_later,
)
from tests.tiny_pipelines import pipeline_folder

PARTS = [
    ("sd15", "unet", UNet2DConditionModel),
    ("sdxl", "unet", UNet2DConditionModel),
    ("sd15", "vae", AutoencoderKL),
    ("sd35", "transformer", SD3Transformer2DModel),
    ("sd15", "text_encoder", CLIPTextModel),
    ("sdxl", "text_encoder_2", CLIPTextModelWithProjection),
    ("sd35", "text_encoder_3", T5EncoderModel),
]
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def copied(name: str, part: str, target: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copy one part of a pipeline, in ``dtype``; return its tensors."""
    source = Path(pipeline_folder(name)) / part
    (file,) = source.glob("*.safetensors")
    (target / part).mkdir(parents=True)
    (target / part / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in load_file(file).items()
    }
    save_file(tensors, target / part / file.name, metadata={"format": "pt"})
    return tensors


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items()
    )


@pytest.mark.parametrize(("name", "part", "family"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_the_library(
    name: str, part: str, family: Any, stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    copied(name, part, tmp_path, stored)
    ours = load_weights(family, str(tmp_path), subfolder=part, torch_dtype=wanted)
    theirs = family.from_pretrained(str(tmp_path), subfolder=part, torch_dtype=torch.float32)
    assert equal(ours, theirs.to(wanted))
    assert not ours.training
    assert {tensor.data_ptr() % 64 for tensor in ours.state_dict().values()} == {0}


def test_shards_and_variants(tmp_path: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(pipeline_folder("sd15"), subfolder="unet")
    network.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    network.half().save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 4
    half = load_weights(UNet2DConditionModel, str(tmp_path), subfolder="unet", variant="fp16")
    assert equal(half, network.float())
    network = UNet2DConditionModel.from_pretrained(pipeline_folder("sd15"), subfolder="unet")
    assert equal(load_weights(UNet2DConditionModel, str(tmp_path), subfolder="unet"), network)
    index = next((tmp_path / "unet").glob("*.index.json"))
    for names, message in (({"x": "../outside.safetensors"}, "does not name files beside it"), ({}, "does not name")):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(InputError, match=message):
            load_weights(UNet2DConditionModel, str(tmp_path), subfolder="unet")
    index.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(InputError, match=r"a shard that .* names is missing"):
        load_weights(UNet2DConditionModel, str(tmp_path), subfolder="unet")


@pytest.mark.parametrize(
    ("name", "part", "family"), PARTS[4:], ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_of_several_types(name: str, part: str, family: Any, wanted: torch.dtype, tmp_path: Path) -> None:
    """As T5 in float16, of which transformers stores one layer of each block in float32."""
    tensors = copied(name, part, tmp_path, torch.float16)
    (file,) = (tmp_path / part).glob("*.safetensors")
    wide = load_file(Path(pipeline_folder(name)) / part / file.name)
    mixed = {key: wide[key] if re.search(r"\.(wo|fc2)\.", key) else tensor for key, tensor in tensors.items()}
    assert {torch.float16, torch.float32} <= {tensor.dtype for tensor in mixed.values()}
    save_file(mixed, file, metadata={"format": "pt"})
    ours = load_weights(family, str(tmp_path), subfolder=part, torch_dtype=wanted)
    theirs = family.from_pretrained(str(tmp_path), subfolder=part, torch_dtype=torch.float32)
    assert equal(ours, theirs.to(wanted))


def test_attention_of_old_vaes(tmp_path: Path) -> None:
    """The names in SD1.5's published VAE."""
    tensors = copied("sd15", "vae", tmp_path, torch.float32)
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old = next((old for new, old in OLD_NAMES.items() if f"attentions.0.{new}." in name), None)
        renamed[re.sub(r"(attentions\.0\.)to_[a-z.0]+(\.\w+)$", rf"\1{old}\2", name) if old else name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    ours = load_weights(AutoencoderKL, str(tmp_path), subfolder="vae")
    assert equal(ours, AutoencoderKL.from_pretrained(pipeline_folder("sd15"), subfolder="vae"))


@pytest.mark.slow
def test_a_file_without_alignment_is_read(tmp_path: Path) -> None:
    """Headers of other programs may have any length."""
    copied("sd15", "unet", tmp_path, torch.float32)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for more in range(8):
        file.write_bytes(
            (length + more).to_bytes(8, "little") + content[8 : 8 + length] + b" " * more + content[8 + length :]
        )
        ours = load_weights(UNet2DConditionModel, str(tmp_path), subfolder="unet")
        assert equal(ours, load_weights(UNet2DConditionModel, pipeline_folder("sd15"), subfolder="unet"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_start_alike_on_files_of_any_type(stored: torch.dtype, tmp_path: Path) -> None:
    """Not rounded to the type of the files."""
    folder = Path(shutil.copytree(pipeline_folder("sd15"), tmp_path / "narrow"))
    shutil.rmtree(folder / "unet")
    copied("sd15", "unet", folder, stored)

    def adapters(source: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"tuning": "lora", "lora": LoRA(rank=2, alpha=2.0)}
        of_reward = create_backbone("sd15", source=source, **options).unet.named_parameters()
        of_policy = PolicySource(source).load(seed=3).network.named_parameters()
        return {
            f"{place} {name}": p
            for place, many in enumerate((of_reward, of_policy))
            for name, p in many
            if "lora_" in name
        }

    narrow, wide = adapters(str(folder)), adapters(pipeline_folder("sd15"))
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_settling_waits_for_the_end_of_the_block() -> None:
    with settling_later():
        network = load_weights(UNet2DConditionModel, pipeline_folder("sd15"), subfolder="unet")
        own = {name: torch.ones_like(tensor) for name, tensor in network.state_dict().items()}
        network.load_state_dict(own, assign=True)
    assert all(bool((tensor == 1).all()) for tensor in network.state_dict().values())


def test_weights_that_are_read_later_have_the_last_type() -> None:
    with reading_later() as listed:
        network = load_weights(UNet2DConditionModel, pipeline_folder("sd15"), subfolder="unet")
        settle(network, torch.bfloat16)
    read_weights(listed.values())
    expected = load_weights(UNet2DConditionModel, pipeline_folder("sd15"), subfolder="unet", torch_dtype=torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_on_the_meta_device_configs_alone_are_read(tmp_path: Path) -> None:
    copied("sd15", "unet", tmp_path, torch.float32)
    for file in (tmp_path / "unet").glob("*.safetensors"):
        file.unlink()
    with torch.device("meta"):
        network = map_model(UNet2DConditionModel, str(tmp_path), subfolder="unet")
        settle(network, torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in network.parameters()} == {
        ("meta", torch.bfloat16)
    }
    with pytest.raises(InputError, match=r"cannot load \S+unet: no file named diffusion_pytorch_model\.safetensors or"):
        map_model(UNet2DConditionModel, str(tmp_path), subfolder="unet")


def test_tied_parameters_stay_tied() -> None:
    layers = torch.nn.ModuleDict({"a": torch.nn.Embedding(3, 2), "b": torch.nn.Embedding(3, 2)})
    layers["b"].weight = layers["a"].weight
    new = torch.ones(3, 2)
    assign(layers, {"b.weight": new})
    assert layers["a"].weight is layers["b"].weight
    assert layers["a"].weight.data_ptr() == new.data_ptr()


@pytest.mark.parametrize(("part", "family"), [("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(
    part: str, family: type[Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = copied("sd15", part, tmp_path, torch.float32)
    name = max(tensors, key=lambda name: tensors[name].numel())
    (file,) = (tmp_path / part).glob("*.safetensors")
    save_file({**tensors, name: tensors[name].to(dtype)}, file)
    with pytest.raises(InputError, match=rf"tensor {re.escape(name)} has type {str(dtype)[6:]}; get files with"):
        load_weights(family, str(tmp_path), subfolder=part)
