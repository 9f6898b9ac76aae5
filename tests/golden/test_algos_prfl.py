"""PRFL: its hinge, and its policy step: one step with gradient, then the reward of the state after the step."""

import pytest
import torch
from torch import Tensor, nn

from latentreward.losses import RewardLoss
from latentreward.rollout import FlowSDESampler
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos/pavrm_head"), ids=lambda case: case.name)
HINGE = RewardLoss(scale=0.1, ceiling=2.0, sigmoid=True)
ATTENTION = "query_attention.multihead_attn."


def pooled(data: Tensors, variant: str, tokens: Tensor, heads: int) -> Tensor:
    """The learned query's attention to the tokens, plus the query, as released; the library's head is not used."""
    attention = nn.MultiheadAttention(tokens.shape[2], heads, batch_first=True)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    attention.load_state_dict({name: data[f"{variant}.{ATTENTION}{name}"].float() for name in names})
    query = data[f"{variant}.query_attention.queries"].float().expand(len(tokens), -1, -1)
    return (attention(query, tokens, tokens, need_weights=False)[0] + query).mean(dim=1)


def logit(data: Tensors, hidden: Tensor) -> Tensor:
    for layer in (1, 2, 3):
        hidden = nn.functional.linear(hidden, *(data[f"mlp.fc{layer}.{part}"].float() for part in ("weight", "bias")))
        hidden = hidden.relu() if layer < 3 else hidden
    return hidden[:, 0]


@every_case
def test_hinge(case: Case) -> None:
    """Loss of the rewards, and its gradient to the tokens where the pooling is that of the policy step."""
    data, heads = case.tensors(), case.options["shape"]["heads"]
    for name in data.below(""):
        if not name.endswith(".hinge.loss"):
            continue
        variant = name.removesuffix(".hinge.loss")
        assert_within(HINGE(data[f"{variant}.logit_win"]), data[name], name, 2e-4)
    tokens = data["shipped.tokens_win"].clone().requires_grad_()
    score = logit(data, pooled(data, "shipped", tokens, heads))
    (slope,) = torch.autograd.grad(HINGE(score), tokens)
    assert_within(score, data["shipped.logit_win"], "shipped.logit_win", 2e-4)
    assert_within(slope, data["shipped.hinge.grad_tokens_win"], "shipped.hinge.grad_tokens_win", 2e-4)


@every_case
def test_policy_step(case: Case) -> None:
    data, heads = case.tensors(), case.options["shape"]["heads"]
    sigmas = data["policy.sigmas"]
    sampler = FlowSDESampler(1000 * sigmas[:-1], sigmas, noise_level=0.0)
    steps = [name.removesuffix(".state") for name in data.below("policy.step") if name.endswith(".state")]
    assert steps
    for step in steps:
        prefix = f"policy.step{step}."
        latents, velocity = data[prefix + "latents"], data[prefix + "v"].clone().requires_grad_()
        timesteps = sampler.timesteps[int(step)].repeat(len(latents))
        state = sampler.transition(latents, velocity, timesteps).mean
        score = logit(data, pooled(data, "policy", state.flatten(2).mT @ data["policy.projection"], heads))
        loss = HINGE(score)
        (slope,) = torch.autograd.grad(loss, velocity)
        found = {"state": state, "prob": score.sigmoid()[:, None], "loss": loss, "grad_v": slope}
        for name, value in found.items():
            assert_within(value, data[prefix + name], prefix + name, 2e-4)
