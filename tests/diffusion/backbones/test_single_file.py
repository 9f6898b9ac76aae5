"""Single-file checkpoints of Stable Diffusion, written under the names of the original code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion.backbones.loading import PipelineSource
from tests.diffusion.backbones.ldm_names import write_sd15
from tests.tiny_pipelines import pipeline_folder, sd_unet

HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with as many blocks as SD1.5, by which diffusers recognises a checkpoint."""
    folder = tmp_path_factory.mktemp("single") / "pipeline"
    tiny = DiffusionPipeline.from_pretrained(pipeline_folder("sd15"), safety_checker=None)
    blocks = ("CrossAttnDownBlock2D",) * 3, ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    torch.manual_seed(0)
    tiny.unet = sd_unet(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=(*blocks[0], "DownBlock2D"),
        up_block_types=blocks[1],
        layers_per_block=2,
    )
    tiny.save_pretrained(folder)
    write_sd15(folder.with_suffix(".safetensors"), tiny.unet, tiny.vae, tiny.text_encoder)
    return folder


def checkpoint(pipeline: Path, folder: Path) -> Path:
    return Path(shutil.copy(pipeline.with_suffix(".safetensors"), folder / "dream.safetensors"))


def copy_configs(pipeline: Path, folder: Path) -> None:
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def lay_out_cache(pipeline: Path, cache: Path) -> None:
    repository = cache / f"models--{HUB.replace('/', '--')}"
    copy_configs(pipeline, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def test_a_checkpoint_with_configs_beside_it_gives_the_pipelines_own_parts(pipeline: Path, tmp_path: Path) -> None:
    path = checkpoint(pipeline, tmp_path)
    copy_configs(pipeline, tmp_path / "dream")
    found, wanted = create_backbone("sd15", source=str(path)), create_backbone("sd15", source=str(pipeline))
    state = wanted.state_dict()
    assert state.keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert any(name.startswith("vae.") for name in state) and found.source == str(path)


def test_configs_come_from_the_hub_or_its_cache(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(pipeline, tmp_path)
    with pytest.raises(InputError, match=f"{HUB} cannot be fetched .*run `hf download {HUB} .*--local-dir .*/dream`"):
        PipelineSource(str(path))
    lay_out_cache(pipeline, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert PipelineSource(str(path)).config("unet")["layers_per_block"] == 2


def test_parts_that_a_checkpoint_lacks_are_those_of_the_folder(pipeline: Path, tmp_path: Path) -> None:
    path = checkpoint(pipeline, tmp_path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name.startswith("model.")}
    save_file(tensors, path)
    shutil.copytree(pipeline, tmp_path / "dream")
    backbone = create_backbone("sd15", source=str(path))
    assert torch.equal(backbone.unet.conv_in.weight, tensors["model.diffusion_model.input_blocks.0.0.weight"])
    (tmp_path / "dream" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"dream/text_encoder: no file named model.safetensors"):
        create_backbone("sd15", source=str(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"unet of .*dream.safetensors: missing tensor conv_in.weight \(1 in all\)"),
        ("other", "cannot load unet of .*dream.safetensors.* give the configs of this model"),
        ("lora", "has tensors of no pipeline that diffusers knows as a single file"),
        ("shape", "has tensors of no pipeline that diffusers knows as a single file"),
        ("v_pred", "has the tensor v_pred, so that the scheduler config of .* may be wrong for it; put the configs of"),
        ("v2", r"is of SD2, whose networks predict noise \(base\) or v \(768\), so that .* into .*/dream/"),
        ("pickle", "is no safetensors file, and files of other kinds are not read: pickles could run code"),
        ("variant", "is a file, which has no revision or variant; leave them out"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(pipeline: Path, tmp_path: Path, damage: str, message: str) -> None:
    path, variant = checkpoint(pipeline, tmp_path), None
    tensors = load_file(path)
    if damage not in ("lora", "shape", "v_pred", "v2"):
        copy_configs(pipeline, tmp_path / "dream")
    if damage == "missing":
        del tensors["model.diffusion_model.input_blocks.0.0.weight"]
        save_file(tensors, path)
    elif damage == "other":
        (tmp_path / "dream" / "unet" / "config.json").write_text(
            json.dumps({**json.loads((pipeline / "unet" / "config.json").read_text()), "layers_per_block": [1, 1]})
        )
    elif damage == "lora":
        save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 8)}, path)
    elif damage == "shape":  # SD3's key with a table of positions that no published model has
        save_file(
            {
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
                "model.diffusion_model.pos_embed": torch.zeros(1, 4, 8),
            },
            path,
        )
    elif damage == "v_pred":
        save_file({**tensors, "v_pred": torch.zeros(1)}, path)
    elif damage == "v2":
        key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
        save_file({**tensors, key: torch.zeros(8, 1024)}, path)
    elif damage == "pickle":
        torch.save(tensors, path := tmp_path / "dream.ckpt")
    else:
        variant = "fp16"
    with pytest.raises(InputError, match=message) as refused:
        PipelineSource(str(path), variant=variant).load(UNet2DConditionModel, "unet", mapped=False)
    assert "\n" not in str(refused.value)
