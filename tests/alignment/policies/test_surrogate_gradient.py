"""Gradients policy → latents → reward on one network, with the two-stage back-propagation."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from latentreward.alignment import POLICY, Policy, PolicySource, surrogate
from latentreward.diffusion import LoRA
from tests.marks import rotated_after
from tests.tiny_pipelines import pipeline_folder

REWARD = "reward"


def two_adapters(name: str, checkpointing: bool) -> Policy:
    """A policy whose network carries a frozen second adapter; both change the output."""
    torch.manual_seed(3)
    source = PolicySource(pipeline_folder(name), lora=LoRA(4, 4.0), gradient_checkpointing=checkpointing)
    policy = source.load()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, policy.network, adapter_name=REWARD)
    policy.adapters.refresh()
    for parameter_name, parameter in policy.network.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in parameter_name)
        if f".{POLICY}." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy.train()


def gradients(policy: Policy, staged: bool) -> dict[str, Tensor]:
    """Of −mean score of the latents that one step of the policy makes."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning, timesteps = policy.encode_prompts(["a cat", "two dogs"]), torch.tensor([700.0, 300.0])

    def score(z: Tensor) -> Tensor:
        return policy.predict(z, timesteps, conditioning).square().flatten(1).mean(dim=1)

    z = latents + 0.5 * policy.predict(latents, timesteps, conditioning)
    with policy.adapters.use(REWARD):
        mean = surrogate(z, score) if staged else score(z).mean()
    (-mean).backward()
    grads = {name: p.grad.clone() for name, p in policy.network.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return {**grads, "mean": mean.detach()}


@pytest.mark.parametrize("name", rotated_after(1, ["sd15", "sd35_no_t5"]))
def test_surrogate_gradients_give_the_gradients_of_one_pass(name: str) -> None:
    expected = gradients(two_adapters(name, checkpointing=False), staged=False)
    assert {key.split(".")[-2] for key in expected if key != "mean"} == {POLICY}
    for checkpointing in (False, True):
        actual = gradients(two_adapters(name, checkpointing), staged=True)
        torch.testing.assert_close(actual, expected)


def test_the_mean_of_half_precision_scores_is_float32() -> None:
    """In bfloat16 the mean of 256 and 257 would be 256."""
    scores = torch.tensor([[256.0], [258.0], [258.0], [258.0]]).bfloat16()
    assert surrogate(torch.zeros(4, 1), lambda z: scores + z.bfloat16()).item() == 257.5


def test_one_pass_with_checkpointing_is_refused_by_torch_and_not_wrong() -> None:
    with pytest.raises((CheckpointError, RuntimeError)):
        gradients(two_adapters("sd15", checkpointing=True), staged=False)
