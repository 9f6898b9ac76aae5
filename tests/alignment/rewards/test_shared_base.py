"""One base, many adapters: a reward on the policy's network scores as on its own, and the policy notices nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentreward.alignment import LatentReward, Policy, RewardMixture, surrogate
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.contracts import NoisyStates
from latentreward.reward.modules.training import single_optimizer
from tests.alignment.rewards.stored import PROMPTS, states_of, tiny_policy, write_run
from tests.marks import rotated_after

FROZEN_TEXT = {"text_encoder_tuning": "frozen"}
SMALL = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4.0}, **FROZEN_TEXT}
SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unet": ("lrm", "sd15", SMALL),
    "dit": ("dina", "sd35", SMALL),
    "whole checkpoint": ("lrm", "sd15", {**SMALL, "whole": True}),
    "frozen backbone": ("lrm", "sd15", {**FROZEN_TEXT, "tuning": "frozen"}),
    "first blocks": ("lrm", "sd15", {**SMALL, "visual_taps": [0, 2]}),
    "lrm on dit": ("lrm", "sd35", SMALL),
}


def outputs(policy: Policy) -> Tensor:
    states = states_of(policy)
    prompts = [PROMPTS[row] for row in states.rows]
    with torch.no_grad():
        return policy.predict(states.latents, states.timesteps, policy.encode_prompts(prompts))


def elements(*modules: nn.Module) -> int:
    """Values in memory that are no adapter's."""
    weights = {
        weight.data_ptr(): weight.numel()
        for module in modules
        for name, weight in module.named_parameters()
        if ".lora_" not in name
    }
    return sum(weights.values())


def scores(reward: LatentScorer, policy: Policy) -> Tensor:
    return reward(states_of(policy), reward.encode_prompts(PROMPTS))


def gradient(reward: LatentScorer, policy: Policy) -> Tensor:
    states = states_of(policy)
    latents = states.latents.clone().requires_grad_()
    total = reward(NoisyStates(latents, states.timesteps, states.rows), reward.encode_prompts(PROMPTS)).sum()
    return torch.autograd.grad(total, latents)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", rotated_after(1, SHARED))
def test_scores_and_policy_are_as_with_two_networks(case: str, tmp_path: Path) -> None:
    method, name, options = SHARED[case]
    write_run(tmp_path, method, name, **options)
    policy = tiny_policy(name)
    own = LatentReward(str(tmp_path), share="never").load(policy)
    before, state = outputs(policy), {key: value.clone() for key, value in policy.state_dict().items()}
    trains = {key for key, weight in policy.named_parameters() if weight.requires_grad}
    size, generator_state = elements(policy), torch.get_rng_state()
    shared = LatentReward(str(tmp_path)).load(policy)

    assert torch.equal(torch.get_rng_state(), generator_state)
    assert elements(policy, shared) == size + elements(shared.model.head)
    assert torch.equal(scores(shared, policy), scores(own, policy))
    torch.testing.assert_close(gradient(shared, policy), gradient(own, policy), rtol=0, atol=0)
    assert torch.equal(outputs(policy), before)
    assert {key for key, weight in policy.named_parameters() if weight.requires_grad} == trains
    after = policy.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    policy.load_state_dict(state)  # strict


@pytest.mark.slow
def test_its_adapter_is_neither_trained_nor_saved_with_the_module(tmp_path: Path) -> None:
    write_run(tmp_path, "dina", "sd35", **SMALL)
    module = nn.Module()
    module.policy = tiny_policy("sd35")
    module.reward = LatentReward(str(tmp_path)).load(module.policy)
    adapter = {weight for name, weight in module.named_parameters() if ".reward." in name}
    assert adapter
    optimizer = single_optimizer(module.parameters(), torch.optim.AdamW, None)
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    assert trained == {weight for name, weight in module.named_parameters() if ".policy." in name}
    state = module.state_dict()
    assert not [name for name in state if ".reward." in name]
    assert {name.partition(".")[0] for name in state} == {"policy", "reward"}
    assert all(name.startswith("reward._owned.head.") for name in state if name.startswith("reward"))
    module.load_state_dict(state)  # strict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "method", "name", "options", "change"),
    rotated_after(
        1,
        [
            ("full training", "lrm", "sd15", FROZEN_TEXT, None),
            ("another network", "lrm", "sd15", SMALL, "network"),
            ("asked not to", "lrm", "sd15", SMALL, "never"),
        ],
    ),
)
def test_networks_that_differ_are_not_shared(
    reason: str, method: str, name: str, options: dict[str, Any], change: str | None, tmp_path: Path
) -> None:
    write_run(tmp_path, method, name, **options)
    policy = tiny_policy(name)
    if change == "network":
        policy.network.mid_block.resnets[0].conv1.weight.data *= 1.1
    reward = LatentReward(str(tmp_path), share="never" if change == "never" else "auto").load(policy)
    network = dict(reward.named_children())["_owned"].unet
    assert not {id(weight) for weight in network.parameters()} & {id(weight) for weight in policy.parameters()}
    assert len(network.up_blocks) == 0
    assert not [key for key in policy.network.peft_config if key != "policy"]


@pytest.mark.slow
def test_a_text_encoder_that_was_trained_stays_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, "lrm", "sd15", **{**SMALL, "text_encoder_tuning": "full"})
    policy = tiny_policy("sd15")
    own = LatentReward(str(tmp_path), share="never").load(policy)
    shared = LatentReward(str(tmp_path)).load(policy)
    assert torch.equal(scores(shared, policy), scores(own, policy))
    text = elements(shared.model.backbone.text_encoder)
    assert elements(policy, shared) == elements(policy) + text + elements(shared.model.head)


@pytest.mark.slow
def test_a_reward_without_t5_encodes_its_own_prompts(tmp_path: Path) -> None:
    """SD3's prompt encoder without T5 gives zeros, seen in training, where the policy's gives tokens."""
    write_run(tmp_path, "dina", "sd35", load_t5=False)
    policy = tiny_policy("sd35")
    own = LatentReward(str(tmp_path), share="never").load(policy)
    shared = LatentReward(str(tmp_path)).load(policy)
    assert shared.model.backbone.text_encoder is not policy.text_encoder
    assert torch.equal(scores(shared, policy), scores(own, policy))


def test_an_exception_leaves_the_network_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "lrm", "sd15", **SMALL)
    policy = tiny_policy("sd15")
    reward, before = LatentReward(str(tmp_path)).load(policy), outputs(policy)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(reward.model.head, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        scores(reward, policy)
    assert torch.equal(outputs(policy), before)


@pytest.mark.slow
def test_gradients_through_both_adapters_under_checkpointing(tmp_path: Path) -> None:
    """Through the reward's adapter into the policy's, by either way of doing it: as on two networks."""
    write_run(tmp_path, "lrm", "sd15", **SMALL)

    def gradients(share: str, checkpointing: bool, through: Callable[..., Tensor]) -> list[Tensor]:
        policy = tiny_policy("sd15", gradient_checkpointing=checkpointing)
        reward = LatentReward(str(tmp_path), share=share).load(policy)
        states = states_of(policy)
        prompts = [PROMPTS[row] for row in states.rows]
        latents = policy.predict(states.latents, states.timesteps, policy.encode_prompts(prompts))
        encoded = reward.encode_prompts(PROMPTS)
        through(latents, lambda value: reward(NoisyStates(value, states.timesteps, states.rows), encoded)).backward()
        return [weight.grad for name, weight in policy.named_parameters() if weight.requires_grad]

    def direct(latents: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        return score(latents).mean()

    expected = gradients("never", False, direct)
    assert any(value.abs().max() > 1e-6 for value in expected)
    for found in (gradients("auto", True, direct), gradients("auto", True, surrogate)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_rewards_share_one_network(tmp_path: Path) -> None:
    policy, separate = tiny_policy("sd15"), tiny_policy("sd15")
    for number, method in enumerate(("lrm", "dina")):
        write_run(tmp_path / str(number), method, "sd15", **SMALL)
    paths = [str(tmp_path / str(number)) for number in range(2)]
    mixed = RewardMixture([LatentReward(path) for path in paths], [1.0, 0.5], "none").load(policy)
    assert set(policy.network.peft_config) == {"policy", "reward", "reward1"}
    first, second = (scores(LatentReward(path, share="never").load(separate), separate) for path in paths)
    torch.testing.assert_close(scores(mixed, policy), first + 0.5 * second)
    assert torch.equal(outputs(policy), outputs(separate))
