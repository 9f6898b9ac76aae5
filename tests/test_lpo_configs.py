"""LPO's and SPO's YAML files parse, build at full size, and the tiny ones train."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentreward.alignment import LPOModule, SigmaThreshold
from latentreward.apps.cli import main
from latentreward.apps.estimate.pipelines import write_pipelines
from latentreward.data import PromptDataModule
from latentreward.tinyworld import TinyWorldPromptDataModule
from tests.marks import rotated_after
from tests.test_recipes import ParsedCLI, parse

FOLDER = Path(__file__).parents[1] / "configs" / "align"
FILES = sorted(path.stem for kind in ("lpo", "spo") for path in FOLDER.glob(f"{kind}_*.yaml"))
TOY = "--model.reward=tests.alignment.modules.toy_rewards.BrightnessSource"


@pytest.fixture(scope="module", autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folders = write_pipelines(tmp_path_factory.mktemp("full_size"))
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in folders.items():
            patch.setenv(f"{name.upper()}_PATH", folder)
        patch.setenv("SD21_BASE_PATH", folders.get("sd21", ""))
        patch.setenv("PROMPTS", str(prompts))
        patch.setenv("LRM_PATH", "lrm")
        patch.setenv("DINA_PATH", "dina")
        patch.setenv("SPM_PATH", "spm")
        yield


def parsed(name: str, *options: str) -> ParsedCLI:
    return parse(f"configs/align/{name}.yaml", options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(2, FILES, release=5))
def test_parses_and_keeps_its_runs_apart(name: str) -> None:
    settings = parsed(name).config["fit"]["trainer"]
    assert settings.default_root_dir == f"runs/{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["lpo_sd15", "lpo_sd3", "lpo_sdxl"]))
def test_builds_at_full_size(name: str) -> None:
    with torch.device("meta"):
        module = parsed(name, TOY).build("model")
    assert isinstance(module, LPOModule)
    trained = {key for key, value in module.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in key for key in trained)
    assert len(module.candidates.steps(module.sampler)) >= 19
    if name == "lpo_sd15":
        assert isinstance(module.selection, SigmaThreshold)
        assert module.selection.threshold(0, module.sampler) == pytest.approx(0.5)


@pytest.mark.slow
def test_files_of_prompts_load() -> None:
    data = parse("configs/align/lpo_sd15.yaml", "configs/data/prompts.yaml").build("data")
    assert isinstance(data, PromptDataModule)
    assert data.prompts == ("a cat", "two dogs")
    assert data.passes == 5
    captions = parse("configs/align/lpo_tiny.yaml", "configs/data/tinyworld_prompts.yaml").build("data")
    assert isinstance(captions, TinyWorldPromptDataModule)
    assert len(captions.prompts) == 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated_after(1, ["lpo_tiny", "spo_tiny", "lpo_sd35_tiny"]))
def test_tiny_ones_train(name: str, tmp_path: Path) -> None:
    """With a reward that is a formula: what configs/model/lrm_tiny.yaml trains takes a minute."""
    small = ("--data.batch_size=4", "--data.prompts_per_rollout=4", "--data.batches_per_epoch=2")
    quick = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=2")
    options = (f"--trainer.default_root_dir={tmp_path}", "--model.sampling.num_inference_steps=4")
    keep = "--model.selection={class_path: QuantileThreshold, init_args: {quantile: 0.5}}"
    main(["fit", f"--config={FOLDER / name}.yaml", TOY, *small, *quick, *options, keep])
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)
    assert (tmp_path / "config.yaml").is_file()
