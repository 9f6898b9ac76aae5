"""Damaged pipelines of every family: one clear line, before a weight is used."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.backbones import create_backbone
from latentreward.errors import InputError
from tests.families.test_methods import one_per_family
from tests.families.twins import Twin

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


@every_family
def test_search_inside_the_pipeline_is_refused(twin: Twin) -> None:
    with pytest.raises(InputError, match=r"StepSearch cannot read the states of .*; use `latentreward generate`"):
        twin.source().resolve_family().search_inputs()
