"""Damaged pipelines of every family: one clear line, before a weight is used."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from tests.diffusion.families.twins import one_per_family

FIRST = one_per_family()[0]
"""What loads weights is the same for all families."""


@pytest.mark.parametrize("part", ["scheduler", "vae", "text_encoder"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    copy = Path(copytree(FIRST.folder, tmp_path / "copy"))
    rmtree(copy / part)
    index = json.loads((copy / "model_index.json").read_text())
    del index[part]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=part) as caught:
        policy = replace(FIRST.source(), source=str(copy)).load()
        policy.family.levels(4, policy.latent_shape(*FIRST.size))
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused_and_before_they_are_read_where_the_config_tells(tmp_path: Path) -> None:
    copy = Path(copytree(FIRST.folder, tmp_path / "copy"))
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    source = replace(FIRST.source(), source=str(copy))
    with pytest.raises(InputError, match=f"tensor {name} has type int8; .* not quantised ones"):
        source.load()
    for part in ("transformer", "text_encoder"):
        for weights in (copy / part).glob("*.safetensors"):
            weights.unlink()
        config = copy / part / "config.json"
        whole = config.read_text()
        config.write_text(json.dumps(json.loads(whole) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
        with pytest.raises(InputError, match=rf"{part}: its config.json has a quantization_config of 'bitsandbytes'"):
            source.load() if part == "transformer" else source.resolve_family().load_prompt_encoder()
        config.write_text(whole)
