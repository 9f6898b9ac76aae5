"""A trained adapter makes the same predictions in diffusers, whatever format it went through."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from latentreward.alignment import (
    Policy,
    RolloutDraws,
    Sampling,
    TrainedLoRA,
    loading_call,
    sample_latents,
    write_kohya,
    write_merged,
)
from latentreward.alignment.export.lora import KOHYA_FILE as FILE
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.diffusion.backbones.loading import PipelineSource
from tests.alignment.policies.alignment import perturbed, prediction, tiny_source
from tests.marks import rotated_after
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
    params=rotated_after(1, [["sd15", True], ["sdxl", False], ["sd3", True], ["sd35_no_t5", False]]), ids=lambda p: p[0]
)
def trained(request: pytest.FixtureRequest) -> tuple[Policy, str]:
    """A policy with an adapter on attention alone, or on many kinds of layers."""
    name, wide = request.param
    layers = (UNET_LAYERS if "sd3" not in name else DIT_LAYERS) if wide else LoRA().target_modules
    return perturbed(tiny_source(name, lora=LoRA(3, 5.0, target_modules=layers)).load().eval()), name


def load(folder: str | Path) -> DiffusionPipeline:
    """A pipeline as a user is told to load it: diffusers wants to know that there is no T5."""
    return eval(loading_call(Path(folder)), {"DiffusionPipeline": DiffusionPipeline})


def test_the_call_that_loads_a_pipeline_names_what_diffusers_wants_named() -> None:
    folder = Path(pipeline_folder("sd35_no_t5"))
    assert loading_call(folder).endswith("sd35_no_t5', text_encoder_3=None, tokenizer_3=None)")
    assert load(folder).text_encoder_3 is None
    assert loading_call(Path(pipeline_folder("sd15"))).endswith("sd15')")


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
    torch.testing.assert_close(with_network(policy, pipeline, lora.family.part), expected)
    with safe_open(file, "pt") as opened:
        noted = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert noted[f"{lora.family.part}.lora_alpha"] == noted[f"{lora.family.part}.r"] == 3
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [file.name]


def test_kohya_file_has_the_same_update(trained: tuple[Policy, str], tmp_path: Path) -> None:
    policy, name = trained
    if policy.family.name == "sd3":
        pytest.skip("it has no names in this format")
    expected, lora = prediction(policy), TrainedLoRA.of_policy(policy)
    write_kohya(lora, tmp_path)
    pipeline = load(pipeline_folder(name))
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    torch.testing.assert_close(with_network(policy, pipeline, lora.family.part), expected)


def test_merged_pipeline_needs_no_lora(trained: tuple[Policy, str], tmp_path: Path) -> None:
    policy, name = trained
    expected, lora = prediction(policy), TrainedLoRA.of_policy(policy)
    write_merged(lora, PipelineSource(pipeline_folder(name)), tmp_path / "merged")
    pipeline = load(tmp_path / "merged")
    assert not any("lora" in key for key in getattr(pipeline, lora.family.part).state_dict())
    torch.testing.assert_close(with_network(policy, pipeline, lora.family.part), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    # diffusers would name some encoders' libraries wrongly, and the base's folder.
    written = json.loads((tmp_path / "merged" / "model_index.json").read_text())
    base = json.loads((Path(pipeline_folder(name)) / "model_index.json").read_text())
    assert {part: written[part] for part in base if part[0] != "_"} == {k: v for k, v in base.items() if k[0] != "_"}
    assert "_name_or_path" not in written


@pytest.mark.parametrize(
    ("name", "style"), rotated_after(2, [("sd35_no_t5", "diffusers"), ("sd15", "kohya"), ("sd15", "diffusers")])
)
def test_alpha_other_than_rank_gives_diffusers_our_samples(name: str, style: str, tmp_path: Path) -> None:
    policy = perturbed(tiny_source(name, lora=LoRA(3, 5.0), t5_length=0).load().eval())
    prompts = PromptBatch(("a cat", "two dogs"), ("0", "1"))
    expected = sample_latents(policy, prompts, Sampling(3), 2.0, seed=0)
    with policy.reference():
        assert (sample_latents(policy, prompts, Sampling(3), 2.0, seed=0) - expected).abs().max() > 0.01
    lora = TrainedLoRA.of_policy(policy)
    file = lora.write_diffusers(tmp_path) if style == "diffusers" else write_kohya(lora, tmp_path)
    pipeline = load(pipeline_folder(name))
    pipeline.load_lora_weights(file.parent, weight_name=file.name)  # offline, diffusers 0.36 asks for the name
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16}
    options |= {"max_sequence_length": 0} if "sd3" in name else {}
    initial = RolloutDraws(0, prompts.keys).initial(policy.latent_shape())
    found = pipeline(list(prompts.prompts), latents=initial, **options).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
