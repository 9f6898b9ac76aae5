"""A trained adapter makes the same predictions in diffusers, whatever format it went through."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentreward.backbones.loading import PipelineSource
from latentreward.backbones.tuning import LoRA
from latentreward.errors import InputError
from latentreward.export import TrainedLoRA, write_kohya, write_merged
from latentreward.export.kohya import FILE
from latentreward.policies import Policy
from tests.marks import slow_after
from tests.policies.alignment import perturbed, prediction, tiny_source
from tests.tiny_pipelines import pipeline_folder

UNET_LAYERS = (
    "to_q",
    "to_out.0",
    "proj_in",
    "proj_out",
    "net.0.proj",
    "net.2",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
)
DIT_LAYERS = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "norm1.linear")


@pytest.fixture(
    params=slow_after(1, [["sd15", True], ["sdxl", False], ["sd3", True], ["sd35_no_t5", False]]), ids=lambda p: p[0]
)
def trained(request: pytest.FixtureRequest) -> tuple[Policy, str]:
    """A policy with an adapter on attention alone, or on many kinds of layers."""
    name, wide = request.param
    layers = (UNET_LAYERS if "sd3" not in name else DIT_LAYERS) if wide else LoRA().target_modules
    return perturbed(tiny_source(name, lora=LoRA(3, 5.0, target_modules=layers)).load().eval()), name


def load(folder: str | Path) -> DiffusionPipeline:
    """A pipeline as a user loads it: diffusers wants to be told that there is no T5."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    return DiffusionPipeline.from_pretrained(
        folder, **{key: None for key, value in index.items() if value == [None, None]}
    )


def with_network(policy: Policy, pipeline: DiffusionPipeline, part: str) -> Tensor:
    """Prediction of the policy's inputs by the network of a diffusers pipeline."""
    own, policy.network = policy.network, getattr(pipeline, part)
    try:
        return prediction(policy)
    finally:
        policy.network = own


def test_diffusers_loads_the_lora(trained: tuple[Policy, str], tmp_path: Path) -> None:
    policy, name = trained
    expected, lora = prediction(policy), TrainedLoRA.of_policy(policy)
    with policy.reference():
        assert (prediction(policy) - expected).abs().max() > 0.01
    file = lora.write_diffusers(tmp_path / "lora")
    pipeline = load(pipeline_folder(name))
    pipeline.load_lora_weights(file, weight_name=FILE)
    torch.testing.assert_close(with_network(policy, pipeline, lora.part), expected)
    with safe_open(file, "pt") as opened:
        noted = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert noted[f"{lora.part}.lora_alpha"] == 5.0
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [file.name]


def test_kohya_file_has_the_same_update(trained: tuple[Policy, str], tmp_path: Path) -> None:
    policy, name = trained
    expected, lora = prediction(policy), TrainedLoRA.of_policy(policy)
    write_kohya(lora, tmp_path)
    pipeline = load(pipeline_folder(name))
    if lora.part == "unet":
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    else:
        add_as_comfyui_does(pipeline.transformer, load_file(tmp_path / FILE))
    torch.testing.assert_close(with_network(policy, pipeline, lora.part), expected)


def add_as_comfyui_does(network: torch.nn.Module, file: dict[str, Tensor]) -> None:
    """Weights of each layer that a key of the file names: W + alpha / rank · up · down; every key must be used."""
    for name, layer in network.named_modules():
        key = f"lora_transformer_{name.replace('.', '_')}"
        if f"{key}.alpha" in file:
            down, up = file.pop(f"{key}.lora_down.weight"), file.pop(f"{key}.lora_up.weight")
            layer.weight.data += file.pop(f"{key}.alpha") / len(down) * up @ down
    assert not file


def test_merged_pipeline_needs_no_lora(trained: tuple[Policy, str], tmp_path: Path) -> None:
    policy, name = trained
    expected, lora = prediction(policy), TrainedLoRA.of_policy(policy)
    write_merged(lora, PipelineSource(pipeline_folder(name)), tmp_path / "merged")
    pipeline = load(tmp_path / "merged")
    assert not any("lora" in key for key in getattr(pipeline, lora.part).state_dict())
    torch.testing.assert_close(with_network(policy, pipeline, lora.part), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35_no_t5"])
def test_images_of_the_pipeline_change_with_the_lora_and_equal_the_merged_ones(name: str, tmp_path: Path) -> None:
    policy = perturbed(tiny_source(name).load().eval())
    lora = TrainedLoRA.of_policy(policy)
    lora.write_diffusers(tmp_path / "lora")
    write_merged(lora, PipelineSource(pipeline_folder(name)), tmp_path / "merged")
    plain = load(pipeline_folder(name))
    before = images(plain)
    plain.load_lora_weights(next((tmp_path / "lora").glob("*.safetensors")))
    assert (images(plain) - before).abs().max() > 0.01
    torch.testing.assert_close(images(plain), images(load(tmp_path / "merged")), atol=1e-4, rtol=0)


def images(pipeline: DiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **size).images


def test_an_adapter_that_is_not_finite_is_not_exported() -> None:
    policy = tiny_source("sd15").load()
    weight = next(p for name, p in policy.named_parameters() if "lora_A" in name)
    weight.data.view(-1)[3] = float("inf")
    with pytest.raises(InputError, match=r"the adapter: .*lora_A.* is not finite"):
        TrainedLoRA.of_policy(policy)


@pytest.mark.parametrize("change", ["library", "file", "pipeline", "attention"])
def test_a_base_whose_code_would_run_is_not_merged(change: str, tmp_path: Path) -> None:
    base = shutil.copytree(pipeline_folder("sd15"), tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    if change == "library":
        index["unet"] = ["evil_module", "UNet2DConditionModel"]
    elif change == "pipeline":
        index["_class_name"] = ["evil_module", "Pipeline"]
    elif change == "file":
        (base / "unet" / "diffusers.py").write_text("raise SystemExit('ran')")
    else:
        config = json.loads((base / "text_encoder" / "config.json").read_text())
        config["_attn_implementation"] = config["attn_implementation"] = "someone/kernels"
        (base / "text_encoder" / "config.json").write_text(json.dumps(config))
    (base / "model_index.json").write_text(json.dumps(index))
    lora = TrainedLoRA.of_policy(tiny_source("sd15").load().eval())
    with pytest.raises(InputError, match=r"could run code|may be downloaded and run"):
        write_merged(lora, PipelineSource(str(base)), tmp_path / "merged")
