"""Euphonium: the guided step of the Dance SDE with its log-probability, the two advantages, and their clipped terms."""

from typing import Any

import pytest
import torch

from latentreward.alignment import GroupAdvantage, OutcomeProcessLoss, RewardGuidance, Transition, gaussian_step_kl
from latentreward.diffusion.noise.processes import predicted_clean
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos/euphonium"), ids=lambda case: case.name)
TOLERANCE = 1e-4


def steps_of(data: Tensors, prefix: str, last: str, separator: str = ".") -> list[int]:
    ending = separator + last
    found = [name.removesuffix(ending) for name in data.below(prefix) if name.endswith(ending)]
    assert found
    return [int(number) for number in found]


def guidance_of(options: dict[str, Any]) -> RewardGuidance:
    scale = options["reward_gradient_scale"]
    return RewardGuidance(
        scale=scale if scale >= 0 else None,
        beta=options.get("reward_gradient_kl_beta", 1.0),
        times_step=options.get("use_delta_t_for_gradient_scaling", False),
        normalise=options["normalize_reward_gradient"],
    )


@every_case
def test_guided_step(case: Case) -> None:
    data = case.tensors()
    for variant, options in case.options["variants"].items():
        for step in steps_of(data, f"{variant}.step", "v"):
            check_step(data, f"{variant}.step{step}.", step, options)


def check_step(data: Tensors, prefix: str, step: int, options: dict[str, Any]) -> None:
    sigma, following = data["sigmas"][step], data["sigmas"][step + 1]
    eta, length = options["eta"], sigma - following
    latents, velocity = data[prefix + "latents"], data[prefix + "v"].clone().requires_grad_()
    growth = eta**2 / (2 * sigma)
    mean = latents - length * velocity - length * growth * (latents + (1 - sigma) * velocity)
    spread = torch.full((len(latents),), eta)
    plain = transition = Transition(mean, spread * length.sqrt(), spread)
    if options.get("use_reward_gradient", True):
        transition = guidance_of(options).guide(plain, data[prefix + "reward_gradient"].clone().requires_grad_())
        assert not transition.shift.requires_grad
    else:
        assert data[prefix + "reward_gradient"].shape == latents.shape
    sample = transition.sample(data[prefix + "noise"])
    told = transition.guided if options["use_reward_guided_mean_for_logprob"] else transition
    log_prob = told.log_prob(sample)
    found = {
        "prev_sample": sample,
        "pred_x0": predicted_clean("flow", latents, velocity, 1.0 - sigma, sigma),
        "log_prob": log_prob,
        "grad_v": torch.autograd.grad(log_prob.sum(), velocity)[0],
    }
    for name, value in found.items():
        assert_within(value, data[prefix + name], prefix + name, TOLERANCE)


@every_case
def test_advantages(case: Case) -> None:
    data, sizes = case.tensors(), case.options["group"]
    groups = torch.arange(sizes["groups"]).repeat_interleave(sizes["num_generations"])
    advantage = GroupAdvantage(ddof=1, epsilon=1e-8)
    for rewards, name in (("rewards", "outcome"), ("process_rewards", "process")):
        found = advantage(data[f"advantage.{rewards}"], groups)
        assert_within(found, data[f"advantage.{name}"], name, TOLERANCE)


@every_case
def test_two_clipped_terms(case: Case) -> None:
    data, told = case.tensors(), case.options["loss"]
    clip = (told["clip_range"], 0.0, told["adv_clip_max"])
    outcome, process = data["advantage.outcome"], data["advantage.process"][:, told["step"]]
    weights = {
        "none": (told["outcome_coef"], 0.0),
        "only": (0.0, told["process_coef"]),
        "both": (told["outcome_coef"], told["process_coef"]),
    }
    for kind, pair in weights.items():
        log_ratio = data["loss.log_ratio"].clone().requires_grad_()
        result = OutcomeProcessLoss(*clip, *pair)(log_ratio, torch.zeros_like(log_ratio), outcome, process)
        loss = result.loss / (told["accumulation"] * told["train_steps"])
        (slope,) = torch.autograd.grad(loss, log_ratio)
        assert_within(loss, data[f"loss_{kind}.loss"], f"loss_{kind}.loss", TOLERANCE)
        assert_within(slope, data[f"loss_{kind}.grad_log_ratio"], f"loss_{kind}.grad_log_ratio", TOLERANCE)


@every_case
def test_released_divergence(case: Case) -> None:
    """An option that is off as shipped; its two weights are logged only, and the second is that of the library's KL."""
    data, eta = case.tensors(), case.options["variants"]["shipped"]["eta"]
    error = (data["kl.policy"] - data["kl.reference"]).double().square().mean()
    for step in steps_of(data, "kl.step", "v1", "_"):
        sigma, following = data["sigmas"][step].double(), data["sigmas"][step + 1].double()
        length = sigma - following
        logged = {
            "v1": length / (eta * sigma) ** 2,
            "v2": length * (1 + eta**2 * (1 - sigma) / (2 * sigma)) ** 2 / (2 * eta**2),
        }
        for version, weight in logged.items():
            name = f"kl.step{step}_{version}"
            assert_within(error * length / (2 * (eta * sigma) ** 2), data[name], name, TOLERANCE)
            assert_within(weight, data[f"{name}_weight_only_logged"], f"{name}_weight_only_logged", TOLERANCE)
        spread = torch.full((len(data["kl.policy"]),), eta)
        factor = length * (1 + eta**2 * (1 - sigma) / (2 * sigma)) / length.sqrt()
        means = (factor * data["kl.policy"], factor * data["kl.reference"])
        ours = gaussian_step_kl(*means, spread).double().mean()
        assert_within(ours, error * logged["v2"], "the library's divergence", TOLERANCE)
