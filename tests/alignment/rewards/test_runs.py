"""What ``latentreward fit`` leaves behind is a reward, by its path alone."""

from pathlib import Path

import pytest
import torch

from latentreward.alignment import LatentReward, PolicySource
from latentreward.apps.cli import main
from latentreward.core.contracts import NoisyStates
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic
from tests.test_end_to_end import PAIRS, options

PROMPTS = ("a red circle on a black background", "two blue squares on a white background")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout", "policies"),
    [
        ("lrm_tiny", "pickapic", {"sd_tiny": False, "sd35_tiny": False}),
        ("dina_lrm_tiny", "hpdv3", {"sd_tiny": False, "sd35_tiny": True}),
    ],
)
def test_a_run_is_a_reward_for_either_generator(
    model: str,
    layout: str,
    policies: dict[str, bool],
    tmp_path: Path,
) -> None:
    write, held_out = (write_pickapic, "validation") if layout == "pickapic" else (write_hpdv3, "test")
    write(tmp_path / "pairs", {"train": PAIRS["train"], held_out: PAIRS["held out"]})
    settings = options(model, layout, {layout: tmp_path / "pairs"}, tmp_path)
    main(["fit", *settings, "--trainer.limit_val_batches=0", "--trainer.callbacks=TrainableCheckpoint"])
    for source, shares in policies.items():
        policy = PolicySource(source).load()
        reward = LatentReward(str(tmp_path / "run")).load(policy)
        assert ("reward" in policy.network.peft_config) == shares
        latents = torch.randn(4, *policy.latent_shape())
        timesteps = policy.noise_process.timesteps_at(torch.tensor([0.9, 0.6, 0.4, 0.1]))
        scores = reward(NoisyStates(latents, timesteps, torch.arange(4) % 2), reward.encode_prompts(PROMPTS))
        assert scores.isfinite().all()
        if shares:
            own = LatentReward(str(tmp_path / "run"), share="never").load(policy)
            states = NoisyStates(latents, timesteps, torch.arange(4) % 2)
            assert torch.equal(own(states, own.encode_prompts(PROMPTS)), scores)
