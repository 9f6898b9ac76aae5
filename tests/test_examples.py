"""The two examples in one file run from training to a LoRA that diffusers reads."""

import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from latentreward.backbones.loading import tiny_pipeline
from latentreward.scoring import RewardModel

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_a_reward_is_trained_and_a_policy_aligned_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import one_file_lpo
    import one_file_lrm

    one_file_lrm.main(["--steps=2", "--pairs=64", f"--output={tmp_path / 'lrm'}"])
    reward = tmp_path / "lrm" / "reward"
    monkeypatch.setattr(one_file_lpo, "PROMPTS", 4)
    monkeypatch.setattr(one_file_lpo, "STEPS", 3)
    monkeypatch.setattr(one_file_lpo, "LOW", 0.0)
    monkeypatch.setattr(one_file_lpo, "HIGH", 0.0)
    one_file_lpo.main([str(reward), "--rounds=1", f"--output={tmp_path / 'lpo'}"])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline("sd_tiny"), safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lpo" / "lora")
    assert pipeline.get_active_adapters()
    assert RewardModel.from_pretrained(reward).recipe is not None
    for name in ("one_file_lrm", "one_file_lpo"):
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 200
        sys.modules.pop(name)
