"""PAVRM's head and losses, and PRFL's policy step: one step with gradient, then the reward of the state after it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentreward.alignment import FlowSDESampler, RewardLoss
from latentreward.core.contracts import FeatureSpec, PairTargets, TapSpec
from latentreward.reward import BradleyTerryLoss, LabelLoss, PAVRMHead
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within
from tests.reward.losses.pairs import scores_of

every_case = pytest.mark.parametrize("case", cases("algos/pavrm_head"), ids=lambda case: case.name)
HINGE = RewardLoss(scale=0.1, ceiling=2.0, sigmoid=True)
SETTINGS = {"plain": {"add_query": False}, "norm": {"normalise": True}, "two_queries": {"add_query": False}}
ATTENTION = "query_attention.multihead_attn."


def head_of(case: Case, data: Tensors, variant: str) -> PAVRMHead:
    """The head with the stored weights; variants that are not named have the released settings."""
    shape = case.options["shape"]
    queries = data[f"{variant}.query_attention.queries"]
    spec = FeatureSpec((TapSpec(shape["feature_dim"], (shape["tokens"],)),), (), 1, 1)
    options = {"num_queries": len(queries), "num_heads": shape["heads"], "widths": tuple(shape["mlp"][1:-1])}
    head = PAVRMHead(spec, **options, **SETTINGS.get(variant, {}))
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    weights = {f"attention.{name}": data[f"{variant}.{ATTENTION}{name}"] for name in names}
    for layer in range(len(shape["mlp"]) - 1):
        weights |= {f"mlp.{2 * layer}.{part}": data[f"mlp.fc{layer + 1}.{part}"] for part in ("weight", "bias")}
    head.load_state_dict({name: weight.float() for name, weight in {"queries": queries, **weights}.items()})
    return head


def score(head: PAVRMHead, tokens: Tensor) -> Tensor:
    return head.mlp(head.pool(tokens)).squeeze(-1)


def check(found: dict[str, Tensor], data: Tensors, prefix: str) -> None:
    for name, value in found.items():
        assert_within(value, data[prefix + name], prefix + name, 2e-4)


@every_case
def test_head_and_losses(case: Case) -> None:
    data = case.tensors()
    variants = [name.removesuffix(".hinge.loss") for name in data if name.endswith(".hinge.loss")]
    assert variants
    for variant in variants:
        head, prefix = head_of(case, data, variant), f"{variant}."
        win, lose = (data[f"{prefix}tokens_{side}"].clone().requires_grad_() for side in ("win", "lose"))
        logit, other = score(head, win), score(head, lose)
        found = {"pooled_win": head.pool(win), "pooled_lose": head.pool(lose), "logit_win": logit}
        check({**found, "prob_win": logit.sigmoid()}, data, prefix)
        check_hinge(data, prefix, win, logit)
        check_labels(data, prefix, win, logit)
        check_pairs(data, prefix, (win, lose), (logit, other))


def check_hinge(data: Tensors, prefix: str, win: Tensor, logit: Tensor) -> None:
    loss = HINGE(logit)
    (slope,) = torch.autograd.grad(loss, win, retain_graph=True)
    check({"loss": loss, "grad_tokens_win": slope}, data, f"{prefix}hinge.")


def check_labels(data: Tensors, prefix: str, win: Tensor, logit: Tensor) -> None:
    """Labels of the images of one side only."""
    label = data[f"{prefix}ce.label"]
    targets = PairTargets(label, torch.full_like(label, torch.nan))
    loss = LabelLoss()(replace(scores_of(logit), targets=targets))
    (slope,) = torch.autograd.grad(loss, win, retain_graph=True)
    check({"loss": loss, "grad_tokens_win": slope}, data, f"{prefix}ce.")


def check_pairs(data: Tensors, prefix: str, tokens: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor]) -> None:
    """In the order of winner and loser, label 1, and exchanged, label 0."""
    pairs = replace(scores_of(logits[0]), rejected=logits[1])
    exchanged = replace(scores_of(logits[1], label=0.0), rejected=logits[0])
    loss = BradleyTerryLoss()(pairs)
    slopes = torch.autograd.grad(loss, tokens, retain_graph=True)
    found = {"loss_win_lose": loss, "loss_lose_win": BradleyTerryLoss()(exchanged)}
    found |= {"grad_tokens_win": slopes[0], "grad_tokens_lose": slopes[1]}
    check(found, data, f"{prefix}bt.")


@every_case
def test_policy_step(case: Case) -> None:
    data = case.tensors()
    head, sigmas = head_of(case, data, "policy"), data["policy.sigmas"]
    sampler = FlowSDESampler(1000 * sigmas[:-1], sigmas, noise_level=0.0)
    steps = [name.removesuffix(".state") for name in data.below("policy.step") if name.endswith(".state")]
    assert steps
    for step in steps:
        prefix = f"policy.step{step}."
        latents, velocity = data[prefix + "latents"], data[prefix + "v"].clone().requires_grad_()
        timesteps = sampler.timesteps[int(step)].repeat(len(latents))
        state = sampler.transition(latents, velocity, timesteps).mean
        logit = score(head, state.flatten(2).mT @ data["policy.projection"])
        loss = HINGE(logit)
        (slope,) = torch.autograd.grad(loss, velocity)
        check({"state": state, "prob": logit.sigmoid()[:, None], "loss": loss, "grad_v": slope}, data, prefix)
