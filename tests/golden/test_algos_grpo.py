"""GRPO's newer parts: noise of a flow's step, trust regions, weights of steps, advantages, credit of steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    GDPO,
    ClippedPolicyLoss,
    DiversityAdvantage,
    FlowDPPO,
    FlowSDESampler,
    GroupAdvantage,
    GRPOGuard,
    RankGate,
    RatioRule,
    StepDrift,
    Transition,
    TurningPointCredit,
    gaussian_step_kl,
    held_weights,
)
from latentreward.alignment.losses.clipped_policy import clipped_objective
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

KINDS = {"sde": "flow", "dance_sde": "dance", "cps": "cps"}
STEPS, LOSSES, ADVANTAGES, GAINS = 2e-5, 5e-4, 2e-4, 1e-6


def every(case: str) -> Any:
    return pytest.mark.parametrize("case", cases(f"algos/{case}"), ids=lambda case: case.name)


@every("sde_steps")
def test_noise_of_a_step(case: Case) -> None:
    data = case.tensors()
    sigmas = data["sigmas"]
    assert {*data} == {*case.options["tensors"]}
    for prefix in sorted({name.rpartition(".")[0] for name in data if "." in name}):
        kind, level = prefix.split(".step")[0].split(".last")[0].rsplit("_", 1)
        sampler = FlowSDESampler(1000 * sigmas[:-1], sigmas, float(level), KINDS[kind])
        check_step(data, prefix, sampler)


def check_step(data: Tensors, prefix: str, sampler: FlowSDESampler) -> None:
    last = prefix.endswith(".last")
    index = len(sampler) - 1 if last else int(prefix.split(".step")[1].split(".", maxsplit=1)[0])
    sample, velocity = data[f"{prefix}.sample"], data[f"{prefix}.v"].clone().requires_grad_()
    transition = sampler.transition(sample, velocity, sampler.timesteps[index].expand(len(sample)))
    found = {
        "prev_mean": transition.mean,
        "std_dev_t": transition.spread if sampler.kind == "flow" else transition.std,
    }
    if last:
        found["log_prob_of_sample"] = transition.log_prob(sample)
    else:
        following = transition.sample(data[f"{prefix}.noise"])
        log_prob = transition.log_prob(following)
        if prefix.endswith("unnormalised"):
            log_prob = log_prob + transition.std.log() + math.log(math.sqrt(2 * math.pi))
        length = (sampler._table[index, 0] - data["sigmas"][index + 1]).sqrt().expand(len(sample))
        found |= {"prev_sample": following, "log_prob": log_prob, "sqrt_dt": length}
        found["grad_v"] = torch.autograd.grad(log_prob.sum(), velocity)[0]
    for name, value in found.items():
        assert_within(value, data[f"{prefix}.{name}"], f"{prefix}.{name}", STEPS)


def check_loss(found: dict[str, Tensor], data: Tensors, prefix: str) -> None:
    for name, value in found.items():
        assert_within(value, data[f"{prefix}.{name}"], f"{prefix}.{name}", LOSSES)


@every("grpo_losses")
def test_losses(case: Case) -> None:
    data = case.tensors()
    assert data["in.prev_sample"].shape == data["in.mean"].shape  # log-probabilities are given
    for variant, options in case.options["variants"].items():
        clip, bound = options["clip_ratio"], options["adv_clip_max"]
        dppo = FlowDPPO(options["kl_mask_threshold"], scaled=options["add_kl_coefficient"])
        check_rule(data, variant, "flow_grpo", None, clip, bound)
        check_rule(data, variant, "dppo", dppo, clip, None)
        check_rule(data, variant, "guard", GRPOGuard(), clip, bound)
        check_rule(data, variant, "guard_ff", GRPOGuard(per_step=True), clip, bound)
        beta = options["tempflow_kl_beta"]
        check_tempflow(data, f"{variant}.tempflow_paper", ClippedPolicyLoss(clip, beta, bound, "noise"))
        check_tempflow(data, f"{variant}.tempflow_recommended", ClippedPolicyLoss(clip, beta, bound, "spread"))


def check_rule(
    data: Tensors, variant: str, name: str, rule: RatioRule | None, clip: float, bound: float | None
) -> None:
    log_prob = data[f"{variant}.log_prob"].clone().requires_grad_()
    mean = data["in.mean"].clone().requires_grad_()
    spread = data["in.std_dev_t"]
    drift = StepDrift.between(mean, data["in.mean_old"], spread * data["in.sqrt_dt"], spread)
    objective = clipped_objective if rule is None else lambda *given: rule.objective(*given, drift)
    result = ClippedPolicyLoss(clip, max_advantage=bound)(
        log_prob, data["in.old_log_prob"], data["in.advantages"], objective=objective
    )
    slopes = torch.autograd.grad(result.loss, [log_prob, mean], allow_unused=True, materialize_grads=True)
    found = {"loss": result.loss, "grad_log_prob": slopes[0]}
    if rule is not None:
        found["grad_mean"] = slopes[1]
    if isinstance(rule, FlowDPPO):
        found |= {"masked_fraction": result.clipped, "kl_max": rule.divergence(drift).max()}
    elif isinstance(rule, GRPOGuard) and not rule.per_step:
        found |= {"ratio_mean": result.ratio, "clipfrac": result.clipped}
    elif isinstance(rule, GRPOGuard):
        ratio = rule.objective(log_prob.double() - data["in.old_log_prob"].double(), log_prob.double(), clip, drift)[1]
        found["ratio"] = ratio
    check_loss(found, data, f"{variant}.{name}")


def check_tempflow(data: Tensors, prefix: str, loss: ClippedPolicyLoss) -> None:
    log_prob = data[f"{prefix.split('.', maxsplit=1)[0]}.log_prob"].clone().requires_grad_()
    mean = data["in.mean"].clone().requires_grad_()
    weights = loss.step_weights(data["in.std_dev_t"] * data["in.sqrt_dt"], data["in.std_dev_t"])
    kl = gaussian_step_kl(mean, data["in.mean_old"], weights)
    result = loss(log_prob, data["in.old_log_prob"], data["in.advantages"], kl, weights)
    slopes = torch.autograd.grad(result.loss, [log_prob, mean])
    found = {"loss": result.loss, "policy_loss": result.policy, "grad_log_prob": slopes[0], "grad_mean": slopes[1]}
    check_loss(found, data, prefix)


@every("grpo_losses")
def test_whole_gradient_of_a_step(case: Case) -> None:
    data, told = case.tensors(), case.options["e2e"]
    sigmas = data["e2e.sigmas"]
    sampler = FlowSDESampler(1000 * sigmas[:-1], sigmas, told["noise_level"])
    timesteps = sampler.timesteps[told["step"]].expand(len(data["e2e.sample"]))

    def transition(velocity: Tensor) -> Transition:
        return sampler.transition(data["e2e.sample"], velocity, timesteps)

    old = transition(data["e2e.v_old"])
    assert_within(old.log_prob(data["e2e.prev_sample"]), data["e2e.old_log_prob"], "old_log_prob", LOSSES)
    rules = {"flow_grpo": None, "dppo": FlowDPPO(told["kl_mask_threshold"]), "guard": GRPOGuard()}
    for name, rule in rules.items():
        velocity = data["e2e.v"].clone().requires_grad_()
        now = transition(velocity)
        log_prob = now.log_prob(data["e2e.prev_sample"])
        assert_within(log_prob, data["e2e.log_prob"], "log_prob", LOSSES)
        drift = StepDrift.between(now.mean, old.mean, now.std, now.spread)
        objective = clipped_objective if rule is None else lambda *given: rule.objective(*given, drift)  # noqa: B023
        bound = None if name == "dppo" else 5.0
        loss = ClippedPolicyLoss(told["clip_ratio"], max_advantage=bound)
        result = loss(log_prob, data["e2e.old_log_prob"], data["e2e.advantages"], objective=objective)
        found = {"loss": result.loss, "grad_v": torch.autograd.grad(result.loss, velocity)[0]}
        check_loss(found, data, f"e2e.{name}")


@every("advantages")
def test_advantages(case: Case) -> None:
    data, weights = case.tensors(), case.options["weights"]
    groups = data["in.group"]
    parts = torch.stack([data[f"in.{name}"] for name in weights], dim=1)
    total = (parts.double() * torch.tensor([*weights.values()], dtype=torch.float64)).sum(dim=1)
    plain = {name: GroupAdvantage(std, 0, 1e-12) for name, std in (("True", "all"), ("False", "group"))}
    found = {f"ff.sum_global_{name}": rule(total, groups) for name, rule in plain.items()}
    found["ff.gdpo"] = GDPO([*weights.values()])(parts, groups)
    clip = data["in.clip"]
    for everyone, std in (("True", "all"), ("False", "group")):
        found[f"verl.global_{everyone}_norm_True"] = GroupAdvantage(std, ddof=1)(clip, groups)
        found[f"verl.global_{everyone}_norm_False"] = GroupAdvantage("none")(clip, groups)
    found["verl.zero_std_group"] = GroupAdvantage("group", ddof=1)(data["in.ocr"], groups)
    alone = groups.clone()
    alone[-1] = groups.max() + 1
    found["verl.singleton"] = GroupAdvantage("group", ddof=1)(clip, alone)
    found["unirl.group"] = GroupAdvantage("group", ddof=1, epsilon=1e-8)(clip, groups)
    found["unirl.global_std"] = GroupAdvantage("all", ddof=1, epsilon=1e-8)(clip, groups)
    found["unirl.trimmed"] = GroupAdvantage("group", ddof=1, epsilon=1e-8, trim=0.2)(clip, groups)
    found["unirl.clipped"] = GroupAdvantage("group", ddof=1, epsilon=1e-8, clip=1.0)(clip, groups)
    for name, value in found.items():
        assert_within(value, data[name], name, ADVANTAGES)
    assert "placeholder" not in data or data["placeholder"].shape == (1,)


@every("advantages")
def test_diversity(case: Case) -> None:
    data = case.tensors()
    found = DiversityAdvantage()(data["gardo.rewards"], data["in.group"], data["gardo.features"])
    assert_within(found, data["gardo.advantages"], "gardo.advantages", ADVANTAGES)


@every("advantages")
def test_rank_gate(case: Case) -> None:
    data, gate = case.tensors(), RankGate(case.options["gardo_beta"][0])
    for number, share in enumerate(case.options["gardo_beta"]):
        prefix = f"gardo.gate{number}"
        rewards = torch.stack([data[f"{prefix}.reward_{name}"] for name in "mab"], dim=1)
        opened, values = gate.opens(rewards[None])[0], gate.uncertainty(rewards)
        assert gate.share == pytest.approx(share)
        assert_within(values.float(), data[f"{prefix}.uncertainty"], f"{prefix}.uncertainty", ADVANTAGES)
        threshold = values[values >= 0].quantile(1 - gate.share)
        assert_within(threshold, data[f"{prefix}.threshold"], f"{prefix}.threshold", ADVANTAGES)
        assert_within(opened, data[f"{prefix}.gate"], f"{prefix}.gate", ADVANTAGES)


@every("tp_grpo")
def test_turning_points(case: Case) -> None:
    data = case.tensors()
    rewards = torch.cat(
        [data["in.ode_reward"][:, None], data["in.intermediate_rewards"].T, data["in.sde_reward"][:, None]], dim=1
    )
    for variant, flags in case.options["variants"].items():
        total = flags["take_delta_global_as_main"]
        bonus = "gain" if total else "remaining" if flags["use_sde_minus_rt"] else "total"
        credit = TurningPointCredit(
            main="total" if total else "gain",
            bonus=bonus,
            weight=flags["eta"],
            first=flags["apply_first_step_bonus"],
            consistent=flags["select_inter_step_only_from_consistent_trajectory"],
            balanced=flags["use_balanced_bonus"],
            alone=flags["drop_original_reward_when_having_bonus"],
        )
        main, extra = credit.parts(rewards)
        gains, difference = rewards.double().diff(dim=1), (rewards[:, -1] - rewards[:, 0]).double()
        found = {
            "gains": gains,
            "signs": gains.sign() * difference.sign()[:, None],
            "main": main,
            "bonus": extra,
            "process_rewards": credit(rewards),
            "delta_global": difference,
        }
        for name, value in found.items():
            assert_within(value, data[f"{variant}.{name}"], f"{variant}.{name}", GAINS)


@every("advantages")
def test_gated_divergence(case: Case) -> None:
    data = case.tensors()
    clip, bound, beta = 1e-2, 5.0, 0.04
    for name in ("some", "none"):
        log_prob = data["gardo.loss.log_prob"].clone().requires_grad_()
        mean = data["gardo.loss.mean"].clone().requires_grad_()
        spread, gate = data["gardo.loss.std_dev_t"].flatten(), data[f"gardo.loss_{name}.gate"]
        kl = gaussian_step_kl(mean, data["gardo.loss.mean_ref"], spread)
        rule = ClippedPolicyLoss(clip, beta, bound)
        # the released policy term is weighted by s / mean(s)
        result = rule(
            log_prob, data["gardo.loss.old_log_prob"], data["gardo.loss.advantages"], kl, spread / spread.mean() / 2.25,
            kl_weights=held_weights(gate),
        )  # fmt: skip
        slopes = torch.autograd.grad(result.loss, [log_prob, mean])
        found = {"loss": result.loss, "policy_loss": result.policy, "kl_loss": (held_weights(gate) * kl).mean()}
        found |= {"grad_log_prob": slopes[0], "grad_mean": slopes[1]}
        for part, value in found.items():
            assert_within(value, data[f"gardo.loss_{name}.{part}"], f"gardo.loss_{name}.{part}", ADVANTAGES)
