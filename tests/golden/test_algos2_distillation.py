"""On-policy distillation: its factors of the noise level, and the variants of others on the package's functions."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import FlowSDESampler, OnPolicyLoss, Transition, gaussian_step_kl
from latentreward.alignment.losses.clipped_policy import clipped_objective
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos2/distillation"), ids=lambda case: case.name)
FLOAT32 = 1e-4
"""Samplers compute means and log-probabilities in float32."""
CLIP = 1e-3


class Step:
    """A step of the case, on the package's sampler."""

    def __init__(self, case: Case, data: Tensors, name: str, noise_level: float | None = None) -> None:
        self.data, self.name, self.index = data, name, int(name.removeprefix("step"))
        sigmas, noise = data["sigmas"], case.options["noise_level"] if noise_level is None else noise_level
        self.sampler = FlowSDESampler(sigmas[:-1] * 1000, sigmas, noise)
        self.width = float(sigmas[self.index] - sigmas[self.index + 1])
        self.x = self["x"]

    def __getitem__(self, name: str) -> Tensor:
        return self.data[f"{self.name}.{name}"]

    def timesteps(self, count: int) -> Tensor:
        return self.sampler.timesteps[self.index].expand(count)

    def transition(self, output: Tensor) -> Transition:
        return self.sampler.transition(self.x, output, self.timesteps(len(output)))

    def rows(self, factor: str, output: Tensor, teachers: Tensor) -> Tensor:
        zeros = output.detach().new_zeros(len(output), *[1] * (output.ndim - 1))
        one = self.sampler.transition(zeros, zeros + 1, self.timesteps(len(output)))
        return OnPolicyLoss(factor)(output, teachers, one.mean.flatten(), one.std)

    def check(self, form: str, rows: Tensor, output: Tensor, tolerance: float, **others: Tensor) -> None:
        rows.mean().backward()
        found = {"row_loss": rows, "loss": rows.mean(), "grad_v": output.grad, **others}
        for name, value in found.items():
            assert_within(value.detach(), self[f"{form}.{name}"], f"{self.name}.{form}.{name}", tolerance)


def steps_of(case: Case, noise_level: float | None = None) -> list[Step]:
    data = case.tensors()
    names = sorted({name.partition(".")[0] for name in data if name.startswith("step")})
    return [Step(case, data, name, noise_level) for name in names]


@every_case
@pytest.mark.parametrize("factor", ["velocity", "mean_match", "kl_exact"])
def test_factors(case: Case, factor: str) -> None:
    for step in steps_of(case):
        output = step["v"].clone().requires_grad_()
        teachers = step["v_teachers"] if factor == "velocity" else step["v_teachers"][:1]
        step.check(factor, step.rows(factor, output, teachers), output, 1e-8)


@every_case
def test_means_without_noise(case: Case) -> None:
    """``ode_mean`` is twice ``mean_match`` of Euler's steps, over all teachers."""
    for step in steps_of(case, noise_level=0.0):
        output = step["v"].clone().requires_grad_()
        step.check("ode_mean", 2 * step.rows("mean_match", output, step["v_teachers"]), output, 1e-8)


@every_case
def test_the_step_and_its_density(case: Case) -> None:
    for step in steps_of(case):
        index = step.index
        assert_within(step.sampler.noise_std[index] / step.width**0.5, step["s"], "s", 1e-8)
        means = torch.stack([step.transition(one).mean for one in step["v_teachers"]])
        assert_within(means, step["teacher_means"], "teacher_means", FLOAT32)
        found = step.transition(step["v_rollout"]).log_prob(step["x_next"])
        assert_within(found, step["log_prob_rollout"], "log_prob_rollout", FLOAT32)


@every_case
def test_the_divergence_of_others_is_that_of_the_steps_times_the_step(case: Case) -> None:
    for step in steps_of(case):
        output = step["v"].clone().requires_grad_()
        ours, theirs = step.transition(output), step.transition(step["v_teachers"][0])
        rows = gaussian_step_kl(ours.mean, theirs.mean, ours.spread)
        step.check("kl_verl", rows, output, FLOAT32)
        exact = step.rows("kl_exact", output.detach(), step["v_teachers"][:1])
        torch.testing.assert_close(rows.detach().double(), step.width * exact, rtol=1e-4, atol=0.0)


@every_case
@pytest.mark.parametrize("form", ["teacher_log_prob", "flow_opd_rows", "flow_opd_paper", "flow_opd_released"])
def test_policy_gradients_of_others(case: Case, form: str) -> None:
    """PPO on the teachers' density; the released Flow-OPD compares all rows of a batch with all others."""
    for step in steps_of(case):
        output = step["v"].clone().requires_grad_()
        log_prob = density(step, output, step["x_next"])
        if form == "teacher_log_prob":
            advantage = torch.stack([density(step, one, step["x_next"]) for one in step["v_teachers"]]).mean(dim=0)
            assert_within(advantage, step[f"{form}.teacher_reward"], f"{form}.teacher_reward", 1e-8)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-4)
        else:
            advantage = -step.width * step.rows("kl_exact", output, step["v_teachers"][:1])
        if form in ("teacher_log_prob", "flow_opd_paper"):
            advantage = advantage.detach()
        log_ratio = log_prob - density(step, step["v_rollout"], step["x_next"])
        given = advantage.clamp(-5, 5)[:, None] if form == "flow_opd_released" else advantage.clamp(-5, 5)
        rows, ratio, _ = clipped_objective(log_ratio, given, CLIP)
        step.check(form, rows, output, 1e-6, log_prob=log_prob, ratio=ratio, advantage=advantage)


def density(step: Step, output: Tensor, following: Tensor) -> Tensor:
    """Log-probability of the next state in float64, whose ratios are near 1."""
    count, shape = len(output), [1] * (output.ndim - 1)
    zeros = step.x.new_zeros(count, *shape)
    of_state, of_output = (
        step.sampler.transition(zeros + state, zeros + 1 - state, step.timesteps(count)).mean for state in (1, 0)
    )
    std = step.sampler.noise_std[step.index]
    square = ((following - of_state * step.x - of_output * output) ** 2).flatten(1).mean(dim=1)
    return -square / (2 * std**2) - std.log() - 0.5 * torch.tensor(2 * torch.pi, dtype=std.dtype).log()
