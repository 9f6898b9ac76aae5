import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentreward.backbones.tuning import LoRA
from latentreward.contracts import Conditioning
from latentreward.errors import InputError
from latentreward.export import TrainedLoRA, write_kohya
from latentreward.generation import load_lora
from latentreward.generation.lora import check_lora
from latentreward.policies import POLICY, Policy, PolicySource
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder


def load(name: str, rank: int = 4) -> Policy:
    source = name if name.endswith("_tiny") else pipeline_folder(name)
    return PolicySource(source, lora=LoRA(rank=rank, alpha=2.0)).load().eval()


def trained(name: str) -> Policy:
    policy, generator = load(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place, weight in policy.named_parameters():
            if f".{POLICY}." in place:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return policy


@torch.no_grad()
def predict(policy: Policy) -> torch.Tensor:
    encoded = policy.encode_prompts(["a cat"])
    conditioning = Conditioning(encoded.prompt_embeds, encoded.pooled_prompt_embeds)
    latents = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    return policy.predict(latents, torch.tensor([501.0]), conditioning)


@pytest.mark.parametrize(
    ("name", "style"),
    rotated_after(
        2,
        [
            ("sd35_tiny", "diffusers"),
            ("sd_tiny", "kohya"),
            ("sd_tiny", "diffusers"),
            ("sdxl", "diffusers"),
            ("sdxl", "kohya"),
        ],
    ),
)
def test_an_exported_lora_does_what_it_did(name: str, style: str, tmp_path: Path) -> None:
    policy = trained(name)
    lora = TrainedLoRA.of_policy(policy)
    lora.write_diffusers(tmp_path) if style == "diffusers" else write_kohya(lora, tmp_path)
    fresh = load(name, rank=2)
    before = predict(fresh)
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)
    with fresh.reference():
        torch.testing.assert_close(predict(fresh), before)


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    TrainedLoRA.of_policy(trained("sd35_tiny")).write_diffusers(tmp_path)
    with pytest.raises(InputError, match="lora: "):
        load_lora(load("sd_tiny"), tmp_path)


def test_names_that_diffusers_does_not_read_are_refused(tmp_path: Path) -> None:
    write_kohya(TrainedLoRA.of_policy(trained("sd35_tiny")), tmp_path)
    with pytest.raises(InputError, match="in diffusers' naming"):
        load_lora(load("sd35_tiny"), tmp_path)


def test_a_lora_of_text_encoders_is_refused(tmp_path: Path) -> None:
    path = TrainedLoRA.of_policy(trained("sd_tiny")).write_diffusers(tmp_path)
    weights = load_file(path)
    name = next(iter(weights))
    save_file({**weights, name.replace("unet", "text_encoder"): weights[name].clone()}, path)
    with pytest.raises(InputError, match="holds text_encoder, which is no weight of the unet"):
        load_lora(load("sd_tiny"), tmp_path)


@pytest.mark.slow
def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="lora: "):
        load_lora(load("sd_tiny"), tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_lora(load("sd_tiny"), tmp_path / "nowhere")


def test_what_is_no_lora_is_told_before_a_policy_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^lora: .*gone does not exist; give"):
        check_lora(tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds no \.safetensors or \.bin file"):
        check_lora(tmp_path)
    (tmp_path / "head.safetensors").touch()
    with pytest.raises(InputError, match="is a reward model, no LoRA of a generator"):
        check_lora(tmp_path)


@pytest.mark.slow
def test_nothing_is_said_while_one_is_loaded(tmp_path: Path) -> None:
    TrainedLoRA.of_policy(trained("sd_tiny")).write_diffusers(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from latentreward.generation import load_lora\nfrom latentreward.policies import PolicySource\n"
        "from latentreward.settings.library_messages import silence_libraries\nsilence_libraries()  # as commands do\n"
        "load_lora(PolicySource('sd_tiny').load(), Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_metadata_import_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of peft's config names a module; so does the folder that such a file may come in."""
    policy = trained("sd_tiny")
    path = TrainedLoRA.of_policy(policy).write_diffusers(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata |= {"unet.megatron_config": {"hidden_size": 1}, "unet.megatron_core": "megatron.core"}
    save_file(load_file(path), path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = load("sd_tiny", rank=2)
    load_lora(fresh, path)
    torch.testing.assert_close(predict(fresh), predict(policy), atol=1e-4, rtol=1e-4)
