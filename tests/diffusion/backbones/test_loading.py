"""Sources that cannot be used, each refused in one line that names field, value and remedy; old files that can."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentreward.alignment import PolicySource
from latentreward.core.contracts import LatentSpace
from latentreward.core.errors import InputError
from latentreward.core.registry import create_backbone
from latentreward.diffusion.backbones.loading import PipelineSource
from tests.diffusion.backbones.networks import FACTORIES, tiny_backbone
from tests.tiny_pipelines import pipeline_folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A pipeline that a test may damage."""
    return lambda name: Path(shutil.copytree(pipeline_folder(name), tmp_path / name))


def refused(name: str, source: Path | str, message: str) -> str:
    with pytest.raises(InputError, match=message) as caught:
        create_backbone(FACTORIES[name], source=str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", FACTORIES)
def test_parts_come_from_the_pipeline(name: str) -> None:
    backbone = tiny_backbone(name)
    shift = 0.0609 if name.startswith("sd3") else 0.0
    scale = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}.get(name, 1.5305)
    assert backbone.latent_space == LatentSpace(4, 2, scale, shift) == backbone.vae.space
    if name == "sd21":
        assert backbone.noise_process.prediction_type == "v_prediction"
        assert backbone.feature_spec.pooled_text_dim == 1024
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())


def test_path_that_is_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        "sd15", tmp_path / "nowhere", "source='.*nowhere' does not exist; give a diffusers pipeline folder or a hub id"
    )
    refused("sd15", tmp_path, "is not a diffusers pipeline: .* give the folder that holds them")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("sd15", tmp_path / "model.safetensors", r"cannot load .*model.safetensors: its header has no valid length")
    refused("sd15", "not a/hub id", "is not here and cannot be fetched from the hub")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("sd15", "models/sd15", r"does not exist: models holds no sd15, and .*HF_HUB_OFFLINE.*; check the path")
    (tmp_path / "models" / "dream.safetensors").write_bytes(b"")
    refused("sd15", str(tmp_path / "models"), r"or the file of a whole model \(dream.safetensors\)")


@pytest.mark.slow
def test_hub_id_without_network_fails_fast() -> None:
    """A port where nothing listens stands for the hub; huggingface_hub alone would retry for half a minute."""
    code = "from latentreward.diffusion import create_backbone; create_backbone('sd15', source='nobody/nothing')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: source='nobody/nothing' is not here and cannot be fetched from the hub" in last
    assert "Retrying" not in done.stderr


CUT = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "model_index.json",
    "unet/config.json",
)


@pytest.mark.parametrize("name", CUT)
def test_truncated_files(copied: Callable[[str], Path], name: str) -> None:
    path = copied("sd15") / name
    path.write_bytes(path.read_bytes()[:-100])
    refused("sd15", path.parents[name.count("/")], f"{path.parent.name if path.suffix != '.json' else name}")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_encoder", "num_attention_heads", -1),
        ("text_encoder", "layer_norm_eps", None),
        ("unet", "norm_eps", "1e-5"),
        ("text_encoder_2", "num_attention_heads", -4),
    ],
)
def test_values_that_fail_in_the_first_pass_alone(
    copied: Callable[[str], Path], part: str, name: str, value: object
) -> None:
    factory = "sdxl" if part.endswith("2") else "sd15"
    path = copied(factory) / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(factory, path.parents[1], rf"cannot load .*{part}: its config.json has {name} = {value!r}; get it as")


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet/diffusion_pytorch_model", "mid_block.resnets.0.conv1.weight"),
        ("text_encoder/model", None),
        ("vae/diffusion_pytorch_model", "encoder.conv_in.weight"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_tensors_that_do_not_fit_are_named(
    copied: Callable[[str], Path], part: str, tensor: str | None, damage: str
) -> None:
    path = copied("sd15") / f"{part}.safetensors"
    state = load_file(path)
    tensor = tensor or next(name for name in state if name.endswith("final_layer_norm.weight"))
    if damage == "missing":
        del state[tensor]
    elif damage == "unexpected":
        tensor = "surplus.weight"
        state[tensor] = torch.zeros(1)
    else:
        state[tensor] = torch.zeros(3)
    save_file(state, path, metadata={"format": "pt"})
    message = refused("sd15", path.parents[1], f"cannot load .*{path.parent.name}")
    assert tensor.removeprefix("text_model.") in message


def test_pickles_are_not_read(copied: Callable[[str], Path]) -> None:
    folder = copied("sd15")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    refused("sd15", folder, "unet")


def test_old_clip_files_load(copied: Callable[[str], Path]) -> None:
    """SD1.5's own text encoder was saved with a prefix and with position ids."""
    folder = copied("sd15")
    path = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, path, metadata={"format": "pt"})
    old, new = create_backbone("sd15", source=str(folder)), tiny_backbone("sd15")
    torch.testing.assert_close(
        old.encode_prompts(["a cat"]).prompt_embeds, new.encode_prompts(["a cat"]).prompt_embeds, rtol=0, atol=0
    )


def test_variant_selects_its_files(copied: Callable[[str], Path]) -> None:
    folder = copied("sd15")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    refused("sd15", folder, "weights are of the variant fp16; set it as variant")
    backbone = create_backbone("sd15", source=str(folder), variant="fp16")
    torch.testing.assert_close(backbone.unet.conv_in.weight, tiny_backbone("sd15").unet.conv_in.weight)


def test_parts_of_other_models_are_named_as_such(copied: Callable[[str], Path]) -> None:
    """Kolors has a ChatGLM in the place of CLIP."""
    folder = copied("sd15")
    path = folder / "text_encoder" / "model.safetensors"
    save_file({f"encoder.{name}": tensor for name, tensor in load_file(path).items()}, path)
    edit_json(folder / "text_encoder" / "config.json", architectures=["ChatGLMModel"])
    refused("sd15", folder, "its config is of a ChatGLMModel, not a CLIPTextModel; give a pipeline of the family")
    edit_json(folder / "model_index.json", _class_name="KolorsPipeline")
    with pytest.raises(InputError, match=r"is a KolorsPipeline, which takes .* a text encoder that no family here has"):
        PolicySource(str(folder)).resolve_family()


def test_a_unet_that_takes_the_guidance_scale_is_refused(copied: Callable[[str], Path]) -> None:
    """LCM's: diffusers runs it without that input, in silence."""
    folder = copied("sd15")
    edit_json(folder / "unet" / "config.json", time_cond_proj_dim=8)
    for use in (PolicySource(str(folder)).resolve_family, lambda: create_backbone("sd15", source=str(folder))):
        with pytest.raises(InputError, match="time_cond_proj_dim"):
            use()


def test_bare_network_folder_is_a_pipeline_without_encoders(copied: Callable[[str], Path]) -> None:
    folder = copied("sd35")
    for entry in folder.iterdir():
        if entry.name not in ("transformer", "scheduler"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    source = PipelineSource(str(folder))
    assert source.has("transformer")
    assert not source.has("vae")
    with pytest.raises(InputError, match="without a vae"):
        source.latent_space()
    assert source.config("transformer")["num_layers"] == 4
