"""Alignment without a rollout buffer: its YAML files parse, build at full size, and the tiny ones train."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.alignment import DiffusionDPOModule, ReFLModule
from latentreward.apps.cli import main
from latentreward.apps.estimate.pipelines import write_pipelines
from latentreward.diffusion import FlowMatching
from tests.marks import rotated_after
from tests.test_recipes import parse

FOLDER = Path(__file__).parents[1] / "configs" / "align"
FILES = sorted(path.name for kind in ("diffusion_dpo", "refl", "prfl") for path in FOLDER.glob(f"{kind}_*.yaml"))
QUICK = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")


@pytest.fixture(scope="module", autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folders = write_pipelines(tmp_path_factory.mktemp("full_size"))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(f"{name.upper()}_PATH", folder)
        for name in ("PICKAPIC_ROOT", "HPDV3_ROOT", "CACHE_ROOT", "LRM_PATH", "DINA_PATH", "PROMPTS"):
            patch.setenv(name, name.lower())
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, FILES, release=5))
def test_parses(name: str) -> None:
    parse(f"configs/align/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["diffusion_dpo_sd15", "diffusion_dpo_sd35"]))
def test_builds_at_full_size(name: str) -> None:
    with torch.device("meta"):
        module = parse(f"configs/align/{name}.yaml").build("model")
    assert isinstance(module, DiffusionDPOModule)
    assert isinstance(module.policy.noise_process, FlowMatching) == (name == "diffusion_dpo_sd35")
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in key for key in trained)


@pytest.mark.slow
def test_tiny_diffusion_dpo_trains(tmp_path: Path) -> None:
    data = (f"--data.root={tmp_path / 'pairs'}", "--data.train_pairs=64", "--data.val_pairs=16")
    config = f"--config={FOLDER / 'diffusion_dpo_tiny.yaml'}"
    run = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", config, *data, "--data.batch_size=4", run, "--trainer.val_check_interval=2", *QUICK])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refl_tiny", "refl_state_tiny"])
def test_tiny_refl_trains(name: str, tmp_path: Path) -> None:
    """With rewards of formulas: what configs/model/lrm_tiny.yaml trains takes a minute."""
    config = f"--config={FOLDER / name}.yaml"
    reward = ("--model.reward=tests.alignment.modules.toy_rewards.BrightnessSource",)
    run = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", config, *reward, "--data.batch_size=2", "--data.batches_per_epoch=2", run, *QUICK])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)
    assert ReFLModule.__name__ in (tmp_path / "config.yaml").read_text()


@pytest.mark.slow
def test_tiny_prfl_trains(tmp_path: Path) -> None:
    config = f"--config={FOLDER / 'prfl_tiny.yaml'}"
    reward = ("--model.reward=tests.alignment.modules.toy_rewards.BrightnessSource",)
    data = [f"--data.images.{option}" for option in (f"root={tmp_path / 'pairs'}", "train_pairs=64", "val_pairs=16")]
    data += ["--data.images.batch_size=2", "--data.prompts.batch_size=2", "--data.prompts.batches_per_epoch=2"]
    main(["fit", config, *reward, *data, f"--trainer.default_root_dir={tmp_path}", *QUICK])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)
