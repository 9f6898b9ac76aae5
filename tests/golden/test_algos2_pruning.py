"""Pruning: what is kept, how well it was predicted, and advantages; the unbiased design is a rule of one's own."""

import pytest
import torch
from torch import Tensor

from latentreward.alignment import Agreement, BestAndWorst, GroupAdvantage, PruningRule, scaled_advantages
from tests.golden.catalogue import Case, Tensors, cases
from tests.golden.closeness import assert_within

every_case = pytest.mark.parametrize("case", cases("algos2/pruning"), ids=lambda case: case.name)
FLOAT32 = 1e-6
"""Advantages are float32 in the package."""


def kept_of(data: Tensors) -> Tensor:
    chosen = [
        BestAndWorst().choose(one, data["best_worst.kept"].shape[1], torch.Generator()) for one in data["predicted"]
    ]
    return torch.stack(chosen).sort(dim=1).values


@every_case
def test_kept_and_agreement(case: Case) -> None:
    data, kept = case.tensors(), kept_of(case.tensors())
    agreement = Agreement.of(data["predicted"], kept, data["reward"].gather(1, kept))
    # The case's formulas are those of many samples: M₂, the kept's mean square, in place of M, and nothing by chance.
    std, mean = torch.std_mean(data["predicted"], dim=1, correction=0, keepdim=True)
    moment = ((data["predicted"] - mean) / std).gather(1, kept).square().mean()
    many = Agreement(torch.stack([*agreement.sums[:3], agreement.sums[0] / moment, *torch.full((2,), 1e12)]))
    slope = agreement.sums[2] / agreement.sums[0]
    own, rewards = data["predicted"].gather(1, kept), data["reward"].gather(1, kept)
    found = {
        "kept": kept,
        "slope": slope,
        "residual": rewards - rewards.mean(dim=1, keepdim=True) - slope * (own - own.mean(dim=1, keepdim=True)),
        "second_moment": many.spread,
        **{name: getattr(many, name) for name in ("correlation_kept", "correlation", "contrast")},
    }
    for name, value in found.items():
        assert_within(value, data[f"best_worst.{name}"], name, 1e-8)


@every_case
def test_advantages(case: Case) -> None:
    data, epsilon = case.tensors(), case.options["settings"]["epsilon"]
    rewards, contrast = data["reward"].gather(1, kept_of(data)), data["best_worst.contrast"]
    assert_within(
        scaled_advantages(GroupAdvantage(epsilon=epsilon), rewards, None), data["best_worst.within"], "", FLOAT32
    )
    # The case adds its ε to the spread of the kept; the rule sees rewards that are divided by √C.
    rule = GroupAdvantage(epsilon=epsilon / contrast.sqrt().item())
    assert_within(scaled_advantages(rule, rewards, contrast), data["best_worst.scaled"], "", FLOAT32)


@every_case
def test_true_advantages_of_the_kept(case: Case) -> None:
    """Form ``all``, which the package does not take, follows from the sums that it keeps."""
    data, kept, settings = case.tensors(), kept_of(case.tensors()), case.options["settings"]
    predicted, rewards = data["predicted"], data["reward"].gather(1, kept)
    sums = Agreement.of(predicted, kept, rewards).sums
    slope, freedom = sums[2] / sums[0], len(kept) * (kept.shape[1] - 1) - 1
    baseline = rewards.mean(dim=1) - slope * (predicted.gather(1, kept).mean(dim=1) - predicted.mean(dim=1))
    squares = sums[1] - slope * sums[2]
    spread = (slope**2 * predicted.var(dim=1, correction=0) + squares / freedom).sqrt()
    assert_within(baseline, data["best_worst.baseline"], "baseline", 1e-8)
    assert_within(spread, data["best_worst.spread"], "spread", 1e-8)
    advantages = (rewards - baseline[:, None]) / (spread[:, None] + settings["epsilon"])
    assert_within(advantages, data["best_worst.all"], "all", 1e-8)


class Systematic(PruningRule):
    """Keeps each candidate with a known probability: π ∝ √(1 + ρ²(z² − 1)), a share of it uniform."""

    def __init__(self, rho: float, uniform_share: float, start: float | None = None) -> None:
        self.rho, self.uniform_share, self.start = rho, uniform_share, start

    def inclusion(self, predicted: Tensor, count: int) -> Tensor:
        std, mean = torch.std_mean(predicted, correction=0)
        wanted = (1 + self.rho**2 * (((predicted - mean) / std) ** 2 - 1)).sqrt()
        shares = (1 - self.uniform_share) * wanted / wanted.sum() + self.uniform_share / len(predicted)
        return (count * shares).clamp(max=1)

    def choose(self, predicted: Tensor, count: int, generator: torch.Generator) -> Tensor:
        start = torch.rand((), generator=generator, dtype=predicted.dtype) if self.start is None else self.start
        return torch.searchsorted(self.inclusion(predicted, count).cumsum(0), start + torch.arange(count), right=True)


@every_case
def test_the_unbiased_design_as_a_rule_of_ones_own(case: Case) -> None:
    data, settings = case.tensors(), case.options["settings"]
    predicted, count = data["predicted"], settings["kept"]
    rules = [Systematic(settings["rho"], settings["uniform_share"], start) for start in data["random.start"].tolist()]
    inclusion = torch.stack([rule.inclusion(one, count) for rule, one in zip(rules, predicted, strict=True)])
    chosen = [rule.choose(one, count, torch.Generator()) for rule, one in zip(rules, predicted, strict=True)]
    kept = torch.stack(chosen).sort(dim=1).values
    own, rewards = predicted.gather(1, kept), data["reward"].gather(1, kept)
    slope = data["best_worst.slope"]
    others = (predicted.sum(dim=1, keepdim=True) - own) / (predicted.shape[1] - 1)
    residual = rewards - slope * own
    baseline = slope * others + (residual.sum(dim=1, keepdim=True) - residual) / (count - 1)
    weight = count / (predicted.shape[1] * inclusion.gather(1, kept))
    found = {"inclusion": inclusion, "kept": kept, "baseline": baseline, "weight": weight}
    found["weighted_advantage"] = weight * (rewards - baseline)
    for name, value in found.items():
        assert_within(value, data[f"random.{name}"], name, 1e-8)
