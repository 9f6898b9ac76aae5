"""Damaged pipelines of every family: one clear line, before a weight is used."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from tests.diffusion.families.twins import Twin, one_per_family

every_family = pytest.mark.parametrize("twin", one_per_family(), ids=lambda twin: twin.family)


@pytest.mark.parametrize("part", ["scheduler", "vae", "tokenizer", "text_encoder"])
@every_family
def test_a_missing_part_is_named(twin: Twin, part: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(twin.folder, copy)
    rmtree(copy / part)
    index = json.loads((copy / "model_index.json").read_text())
    del index[part]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=part) as caught:
        policy = replace(twin.source(), source=str(copy)).load()
        policy.family.levels(4, policy.latent_shape(*twin.size))
    assert "\n" not in str(caught.value)


@every_family
def test_stored_quantised_weights_are_refused(twin: Twin, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(twin.folder, copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    for tuning in ("full", "lora"):
        with pytest.raises(InputError, match=f"tensor {name} has type int8; .* not quantised ones"):
            create_backbone(twin.backbone, source=str(copy), visual_taps=[1], text_taps=[], tuning=tuning)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@every_family
def test_a_config_of_quantised_weights_is_refused_before_they_are_read(twin: Twin, part: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(twin.folder, copy)
    for weights in (copy / part).glob("*.safetensors"):
        weights.unlink()
    path = copy / part / "config.json"
    stored = {"quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | stored))
    with pytest.raises(InputError, match=rf"{part}: its config.json has a quantization_config of 'bitsandbytes'; get"):
        replace(twin.source(), source=str(copy)).load()
