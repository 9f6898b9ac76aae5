"""PRFL: its hinge, and its policy step: one step with gradient, then the reward of the state after the step."""

from functools import partial

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
    """The learned queries' attention to the tokens as released, of each variant; the library's head is not used."""
    norm = partial(nn.functional.layer_norm, normalized_shape=tokens.shape[2:], eps=1e-6) if variant == "norm" else None
    attention = nn.MultiheadAttention(tokens.shape[2], heads, batch_first=True)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    attention.load_state_dict({name: data[f"{variant}.{ATTENTION}{name}"].float() for name in names})
    query = data[f"{variant}.query_attention.queries"].float().expand(len(tokens), -1, -1)
    tokens = tokens if norm is None else norm(tokens)
    output = attention(query, tokens, tokens, need_weights=False)[0]
    output = output if norm is None else norm(output)
    return (output if variant in ("plain", "two_queries") else output + query).mean(dim=1)


def logit(data: Tensors, hidden: Tensor) -> Tensor:
    for layer in (1, 2, 3):
        hidden = nn.functional.linear(hidden, *(data[f"mlp.fc{layer}.{part}"].float() for part in ("weight", "bias")))
        hidden = hidden.relu() if layer < 3 else hidden
    return hidden[:, 0]


@every_case
def test_hinge(case: Case) -> None:
    data, heads = case.tensors(), case.options["shape"]["heads"]
    variants = [name.removesuffix(".hinge.loss") for name in data if name.endswith(".hinge.loss")]
    assert variants
    for variant in variants:
        tokens = data[f"{variant}.tokens_win"].clone().requires_grad_()
        score = logit(data, pooled(data, variant, tokens, heads))
        loss = HINGE(score)
        (slope,) = torch.autograd.grad(loss, tokens)
        found = {"logit_win": score, "hinge.loss": loss, "hinge.grad_tokens_win": slope}
        for name, value in found.items():
            assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", 2e-4)


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
