"""A saved reward model loads to the same scores, bit for bit, on the very base it was trained on."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from latentreward.alignment import LatentReward
from latentreward.core.errors import InputError
from latentreward.reward import (
    RewardModel,
    ScoringNoise,
)
from latentreward.reward.scoring import publishing
from tests.alignment.rewards.stored import scores_by, states_of, tiny_policy, write_run
from tests.marks import rotated_after
from tests.reward.scoring.test_published import write_dina, write_lrm
from tests.tiny_pipelines import LATENTS, pipeline_folder

pytestmark = pytest.mark.usefixtures("bases_here")

PROMPTS = ["a cat", "a dog", "a cat", ""]
LORA = {"rank": 2, "alpha": 3.0}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LRM, all trained": ("lrm", "sd15", {}),
    "DRM on a U-Net": ("drm", "sd15", {"output_map": True}),
    "LRM, LoRA everywhere": ("lrm", "sdxl", {"tuning": "lora", "text_encoder_tuning": "lora", "lora": LORA}),
    "DiNa-LRM": ("dina", "sd35", {"lora": LORA}),
    "DiNa-LRM, text LoRA": ("dina", "sd35", {"lora": LORA, "text_encoder_tuning": "lora"}),
    "PAVRM": ("pavrm", "sd35", {"text_taps": [], "lora": LORA}),
    "LayerMix": ("layer_mix", "sdxl", {"tuning": "frozen", "text_encoder_tuning": "frozen"}),
}


def pictures(number: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (24 + 4 * n, 32, 3), dtype=np.uint8)) for n in range(number)]


def scores(model: RewardModel) -> Tensor:
    """Of images, and of latents at two levels."""
    latents = torch.randn(4, 4, LATENTS, LATENTS, generator=torch.Generator().manual_seed(0))
    levels = ScoringNoise(sigmas=(0.2, 0.7))
    return torch.cat([model.score(PROMPTS, pictures()), model.score_latents(PROMPTS, latents, noise=levels)])


def saved_run(folder: Path, method: str = "dina", name: str = "sd35", **options: Any) -> Path:
    """A model folder made of a run."""
    write_run(folder / "run", method, name, **options)
    RewardModel.from_pretrained(folder / "run").save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.slow
@pytest.mark.parametrize("kind", rotated_after(3, RUNS))
def test_a_run_is_saved_bit_for_bit(kind: str, tmp_path: Path) -> None:
    method, name, options = RUNS[kind]
    module = write_run(tmp_path / "run", method, name, **options)
    before = torch.random.get_rng_state()
    model = RewardModel.from_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(scores(again), scores(model))
    states = states_of(tiny_policy(name))
    assert torch.equal(again(*call_of(again, states)), scores_by(module, states))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "saved").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "twice" / path.relative_to(tmp_path / "saved")).read_bytes()
    assert (tmp_path / "saved/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


def call_of(model: RewardModel, states: Any) -> tuple[Any, ...]:
    """Arguments of the model's forward, as ``scores_by`` calls it."""
    conditioning, uncond = model.encode_prompts(("a cat", "two dogs"))
    return states.latents, states.timesteps, conditioning.select(states.rows), uncond


@pytest.mark.parametrize("layout", rotated_after(1, ["sd15", "sdxl", "dina"]))
def test_a_published_layout_is_saved_bit_for_bit(layout: str, tmp_path: Path) -> None:
    write_dina(tmp_path / "published") if layout == "dina" else write_lrm(tmp_path / "published", layout)
    base = None if layout == "dina" else pipeline_folder(layout)
    before = torch.random.get_rng_state()
    model = RewardModel.from_pretrained(tmp_path / "published", base=base)
    assert torch.equal(torch.random.get_rng_state(), before)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "saved")), scores(model))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "family", "folder"),
    rotated_after(
        1,
        [
            ("sd35", "transformer", SD3Transformer2DModel, "adapter"),
            ("sd15", "unet", UNet2DConditionModel, "adapter"),
            ("sdxl", "text_encoder", CLIPTextModel, "adapter_text_encoder"),
        ],
    ),
)
def test_peft_reads_the_adapters(name: str, part: str, family: Any, folder: str, tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "dina", name, tuning="lora", text_encoder_tuning="lora", lora=LORA)
    network = family.from_pretrained(pipeline_folder(name), subfolder=part)
    plain = {key: value.clone() for key, value in network.state_dict().items()}
    read = PeftModel.from_pretrained(network, saved / folder)
    ours = {name.replace(".default.", "."): tensor for name, tensor in read.named_parameters() if ".lora_" in name}
    file = load_file(saved / folder / "adapter_model.safetensors")
    assert set(ours) == set(file)
    assert all(torch.equal(ours[name], file[name]) for name in file)
    merged = read.merge_and_unload().state_dict()
    model = RewardModel.from_pretrained(saved)
    network = model.backbone.get_submodule(f"text_encoder.{part}" if "text" in part else part)
    from peft.tuners.lora import LoraLayer

    for layer_name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            expected = plain[f"{layer_name}.weight"] + layer.get_delta_weight("default")
            torch.testing.assert_close(merged[f"{layer_name}.weight"], expected)


def changed_base(name: str, part: str, folder: Path, factor: float = 1.1) -> str:
    """A copy of a tiny pipeline whose ``part`` has other weights."""
    shutil.copytree(pipeline_folder(name), folder)
    path = next((folder / part).glob("*.safetensors"))
    weights = {key: value * factor if value.is_floating_point() else value for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "part", "options"),
    rotated_after(
        1,
        [
            ("dina", "sd35", "transformer", {"lora": LORA}),
            ("dina", "sd35", "text_encoder_2", {"lora": LORA}),
            ("dina", "sd35", "vae", {"lora": LORA}),
            ("lrm", "sd15", "vae", {}),
            ("lrm", "sd15", "text_encoder", {"text_encoder_tuning": "frozen"}),
        ],
    ),
)
def test_another_base_is_refused(method: str, name: str, part: str, options: dict, tmp_path: Path) -> None:
    saved = saved_run(tmp_path, method, name, **options)
    base = changed_base(name, part, tmp_path / "base")
    with pytest.raises(InputError, match=rf"belongs to the base {name}, whose .* differs") as caught:
        RewardModel.from_pretrained(saved, base=base)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_copy_of_the_base_will_do_and_weights_of_our_own_are_not_read_from_it(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "lrm", "sd15")
    before = scores(RewardModel.from_pretrained(saved))
    copy = shutil.copytree(pipeline_folder("sd15"), tmp_path / "copy")
    for part in ("unet", "text_encoder"):
        for path in (copy / part).glob("*.safetensors"):
            path.unlink()
    assert torch.equal(scores(RewardModel.from_pretrained(saved, base=str(copy))), before)
    config = json.loads((saved / "config.json").read_text())
    config["backbone"]["init_args"]["source"] = "/moved/away"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: backbone: source='/moved/away' does not exist"):
        RewardModel.from_pretrained(saved)
    assert torch.equal(scores(RewardModel.from_pretrained(saved, base=str(copy))), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["sd35", "sd15"]))
@pytest.mark.parametrize("text", ["frozen", "lora"])
def test_a_saved_adapter_runs_on_the_policys_network(name: str, text: str, tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "dina", name, tuning="lora", text_encoder_tuning=text, lora=LORA)
    policy = tiny_policy(name)
    states = states_of(policy)
    own = LatentReward(str(saved), share="never").load(policy)
    expected = own(states, own.encode_prompts(PROMPTS[:2]))
    shared = LatentReward(str(saved)).load(policy)
    assert shared.model.image_sizes == own.model.image_sizes
    assert shared.model.backbone.get_submodule(policy_network(name)) is policy.network
    assert (shared.model.backbone.text_encoder is policy.text_encoder) == (text == "frozen")
    torch.testing.assert_close(shared(states, shared.encode_prompts(PROMPTS[:2])), expected, rtol=1e-5, atol=1e-5)


def policy_network(name: str) -> str:
    return "unet" if name == "sd15" else "transformer"


@pytest.mark.slow
def test_only_model_folders_and_empty_ones_are_replaced(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, lora=LORA)
    model = RewardModel.from_pretrained(saved)
    model.save_pretrained(saved)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    (saved / "notes.txt").write_text("mine")
    for folder, message in ((saved, "holds notes.txt"), (tmp_path / "run", "holds config.yaml")):
        with pytest.raises(InputError, match=message):
            model.save_pretrained(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="not a model folder"):
        model.save_pretrained(tmp_path / "other")
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_a_killed_save_leaves_no_folder_or_the_old_one(existing: bool, files: int, tmp_path: Path) -> None:
    saved, target = saved_run(tmp_path, lora=LORA), tmp_path / "target"
    if existing:
        shutil.copytree(saved, target)
    model = RewardModel.from_pretrained(saved)
    if (process := os.fork()) == 0:
        save_and_die(model, target, files)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert target.exists() == existing
    if existing:
        assert names(target) == names(saved)
        RewardModel.from_pretrained(target)
    (partial,) = tmp_path.glob(".target.*.partial")
    with pytest.raises(InputError):
        RewardModel.from_pretrained(partial)
    model.save_pretrained(target)
    RewardModel.from_pretrained(target)
    assert not list(tmp_path.glob(".target.*"))


def save_and_die(model: RewardModel, target: Path, files: int) -> None:
    """Save, and be killed once so many files of tensors are written."""
    written: list[Path] = []

    def write(state: dict[str, Tensor], path: Path, **options: Any) -> None:
        save_file(state, path, **options)
        written.append(path)
        if len(written) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    publishing.save_file = write
    model.save_pretrained(target)
    os._exit(1)


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "dina", "sd35", lora=LORA)
    model = RewardModel.from_pretrained(tmp_path / "run")
    next(model.head.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(InputError, match=r"the reward model: head\..* is not finite"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
