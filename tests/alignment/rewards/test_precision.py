"""A frozen reward under bf16-mixed: its products in bfloat16, its head and scores in float32, outside autocast."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from latentreward.alignment import LatentReward, LPOModule, PolicySource, RewardMixture
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.reward import RewardModel
from tests.alignment.rewards.stored import PROMPTS, states_of, tiny_policy, write_run
from tests.tiny_pipelines import source_of

SMALL = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4.0}}


@pytest.mark.parametrize(("method", "name"), [("lrm", "sd15"), ("dina", "sd35")])
def test_scores_are_those_of_the_model_at_this_precision(method: str, name: str, tmp_path: Path) -> None:
    write_run(tmp_path, method, name, **(SMALL if method == "dina" else {}))
    policy = tiny_policy(name)
    reward = LatentReward(str(tmp_path), share="never").load(policy)
    reward.set_precision(torch.bfloat16)
    states, model = states_of(policy), RewardModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    conditioning, uncond = model.encode_prompts(PROMPTS)
    expected = model(states.latents, states.timesteps, conditioning.select(states.rows), uncond)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = reward(states, reward.encode_prompts(PROMPTS))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected.detach())
    assert {weight.dtype for weight in reward.model.head.parameters()} == {torch.float32}
    halved = sum(weight.numel() for weight in reward.parameters() if weight.dtype == torch.bfloat16)
    assert halved > 0.5 * sum(weight.numel() for weight in reward.model.backbone.parameters())


def published(folder: Path) -> str:
    """A model folder, whose tensors are mapped from safetensors."""
    write_run(folder / "run", "lrm", "sd15")
    RewardModel.from_pretrained(str(folder / "run")).save_pretrained(folder / "reward")
    return str(folder / "reward")


@pytest.mark.slow
def test_weights_are_read_straight_in_their_precision(tmp_path: Path) -> None:
    path = published(tmp_path)
    reward = LatentReward(path, base=source_of("sd15"), share="never").load(tiny_policy("sd15"))
    reward.set_precision(torch.bfloat16)
    expected = RewardModel.from_pretrained(path, base=source_of("sd15"), dtype=torch.bfloat16).state_dict()
    assert reward.model.state_dict().keys() == {name for name in expected if not name.startswith("backbone.vae.")}
    for name, value in reward.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_gradients_reach_the_latents(tmp_path: Path) -> None:
    write_run(tmp_path, "dina", "sd35", **SMALL)
    policy = tiny_policy("sd35")
    states, slopes = states_of(policy), []
    for dtype in (torch.float32, torch.bfloat16):
        reward = LatentReward(str(tmp_path), share="never").load(policy)
        reward.set_precision(dtype)
        latents = states.latents.clone().requires_grad_()
        scores = reward(type(states)(latents, states.timesteps, states.rows), reward.encode_prompts(PROMPTS))
        slopes.append(torch.autograd.grad(scores.sum(), latents)[0])
    assert torch.nn.functional.cosine_similarity(*(slope.flatten() for slope in slopes), dim=0) > 0.99


@pytest.mark.slow
def test_what_the_policy_shares_keeps_its_precision(tmp_path: Path) -> None:
    write_run(tmp_path, "dina", "sd35", **SMALL)
    policy = tiny_policy("sd35")
    reward = LatentReward(str(tmp_path)).load(policy)
    assert reward.model.backbone.transformer is policy.network
    states = states_of(policy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = reward(states, reward.encode_prompts(PROMPTS))
        reward.set_precision(torch.bfloat16)
        assert torch.equal(reward(states, reward.encode_prompts(PROMPTS)), before)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_the_trainer_s_precision_sets_that_of_the_reward(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15")
    source = RewardMixture([LatentReward(str(tmp_path), share="never")], [1.0])
    module = LPOModule(PolicySource(source_of("sd15")), source, seed=0)
    module.trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    for stage in ("fit", "test"):
        module.setup(stage)
    (scorer,) = (part for part in module.reward.modules() if isinstance(part, LatentScorer))
    assert scorer.model.dtype == dtype
    assert scorer.model.backbone.unet.conv_in.weight.dtype == dtype
    assert {weight.dtype for weight in module.policy.parameters()} == {torch.float32}
