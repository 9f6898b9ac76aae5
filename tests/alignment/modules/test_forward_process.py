"""NFT, AWM, RAM, DGPO and CRD learn from finished samples: gradients, copies of the adapter, refusals, resumes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    AWMModule,
    CRDModule,
    DGPOModule,
    DiffusionNFTModule,
    ForwardProcessModule,
    GroupAdvantage,
    MatchingLoss,
    NFTLoss,
    NoisiestSteps,
    NormGuard,
    Policy,
    PolicySource,
    RAMLoss,
    RAMModule,
    RandomSteps,
    Reward,
    Sampling,
    StratifiedSteps,
    sample_latents,
)
from latentreward.alignment.losses.nft import optimality
from latentreward.alignment.policies.moving_average import AVERAGE, OLD, DecayRamp
from latentreward.core.contracts import NoisyStates, PromptBatch, RenoisedGroups, RenoisedSamples, take_rows
from latentreward.core.errors import InputError
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA, TimestepGrid
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.simple_reward import FirstChannel, FirstChannelReward
from tests.alignment.modules.test_grpo import attached
from tests.marks import rotated_after, slow_after
from tests.tiny_pipelines import source_of

PROMPTS = ("a red circle", "two blue squares on a white background")
BATCH = PromptBatch(PROMPTS, ("0/0", "0/1"))
KINDS = {"nft": DiffusionNFTModule, "awm": AWMModule, "ram": RAMModule, "dgpo": DGPOModule, "crd": CRDModule}
LEVELS = {"nft": 3, "awm": 2, "ram": 3, "dgpo": 2, "crd": 3}
"""Noise levels of each sample of :func:`make`."""
GROUPED = ("dgpo", "crd")
every_kind = pytest.mark.parametrize("kind", KINDS)


class OnePrompt(FirstChannel):
    """Scores the samples of every prompt but the first of ``PROMPTS`` equally."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(prompt == PROMPTS[0]) for prompt in prompts])

    def score(self, states: NoisyStates, encoded: Tensor) -> Tensor:
        return super().score(states, None) * encoded[states.rows]


class OnePromptReward(FirstChannelReward):
    def load(self, policy: Policy) -> Reward:
        return OnePrompt(self.scale)


def make(
    kind: str, scale: float = 10.0, name: str = "sd35_tiny", source_of_reward: Any = FirstChannelReward, **options: Any
) -> ForwardProcessModule:
    settings: dict[str, Any] = {"sampling": Sampling(4), "num_samples": 3, "seed": 1}
    own = {"awm": {"steps": StratifiedSteps(2)}, "ram": {"draws": 3}, "dgpo": {"steps": NoisiestSteps(2)}}
    settings |= own.get(kind, {})
    source = PolicySource(source_of(name), lora=LoRA(rank=4, alpha=4))
    return KINDS[kind](source, source_of_reward(scale), **{**settings, **options})


def adapter(module: ForwardProcessModule, name: str = "policy") -> dict[str, Tensor]:
    """Weights of one of the adapters, by their names without its own."""
    named = module.policy.network.named_parameters()
    return {key.replace(f".{name}.", "."): weight for key, weight in named if f".{name}." in key}


def samples_of(rows: RenoisedSamples | RenoisedGroups) -> RenoisedSamples:
    """Rows by sample, then by level."""
    if isinstance(rows, RenoisedSamples):
        return rows
    levels = len(rows) // len(PROMPTS)
    found, count = rows.samples(shared_noise=False), rows.advantage.shape[1]
    order = torch.arange(len(found)).view(len(PROMPTS), levels, count).transpose(1, 2).flatten()
    return take_rows(found, order.tolist())


def moved(module: ForwardProcessModule) -> None:
    """Change the trained adapter."""
    for number, weight in enumerate(adapter(module).values()):
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))


@every_kind
def test_samples_are_those_of_the_copy_at_their_noise_levels(kind: str) -> None:
    module = attached(make(kind))
    moved(module)
    samples = samples_of(module.roll_out(BATCH))
    count = len(samples) // 6
    assert count == LEVELS[kind]
    rows = samples.latents.view(6, count, *samples.latents.shape[1:])
    assert torch.equal(rows[:, :1].expand_as(rows), rows)
    # RAM's levels come from a distribution.
    assert (set(samples.timesteps.tolist()) <= set(module.sampler.timesteps.tolist())) == (kind != "ram")
    repeated = PromptBatch(tuple(prompt for prompt in PROMPTS for _ in range(3)),
                           tuple(f"{key}/{number}" for key in BATCH.keys for number in range(3)))  # fmt: skip
    with module.policy.adapters.use(OLD):
        want = sample_latents(module.policy.eval(), repeated, module.sampling, module.guidance_scale, 1)
    torch.testing.assert_close(rows[:, 0], want, rtol=1e-5, atol=1e-5)
    rewards = 10 * want[:, 0].flatten(1).mean(dim=1).double().view(2, 3)
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(samples.advantage[::count], advantage.flatten().float(), rtol=1e-3, atol=1e-4)


def test_nft_has_no_gradient_where_nothing_is_better() -> None:
    """Where r = ½ and the policy equals its copy, both halves pull equally."""
    module = attached(make("nft", loss=NFTLoss(kl_weight=0.0)))
    samples = module.roll_out(BATCH)
    module.training_step(replace(samples, advantage=torch.zeros(len(samples))), 0).backward()
    assert all(weight.grad.abs().max() < 1e-6 for weight in adapter(module).values())


def test_awm_has_the_gradient_of_the_advantages_before_the_first_step() -> None:
    """At ratio 1 the gradient is −A ∇ℓ, whatever the range of the ratio."""
    grads, losses = [], [MatchingLoss(clip_range=one, kl_weight=0.0, average_weight=0.0) for one in (1.0, 1e-6)]
    module = attached(make("awm", loss=losses[0]))
    moved(module)
    module.copies[0].follow(0)
    samples = module.roll_out(BATCH)
    for module.loss in losses:
        module.zero_grad()
        module.training_step(samples, 0).backward()
        grads.append({name: weight.grad.clone() for name, weight in adapter(module).items()})
    module.zero_grad()
    states = module.renoise(samples)
    log_prob = module.loss.log_prob(module.predict(samples, states), states.target, states.sigmas)
    (-(samples.advantage.clamp(-5, 5) / 5) * log_prob).mean().backward()
    for name, weight in adapter(module).items():
        for grad in grads:
            torch.testing.assert_close(grad[name], weight.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", slow_after(1, ["sd15", "sd35_tiny"]))
def test_ram_regresses_on_the_reference_and_the_old_policys_residual(name: str) -> None:
    """The loss is that of the formula, on the module's own noise, for noise and velocity."""
    module = attached(make("ram", name=name, loss=RAMLoss(7.0), levels=TimestepGrid(0, 999, 1)))
    moved(module)
    module.copies[0].follow(0)
    samples = module.roll_out(BATCH)
    moved(module)
    states = module.renoise(samples)
    with torch.no_grad():
        output = module.predict(samples, states)
    old, reference = (module.predict_under(name, samples, states) for name in (OLD, None))
    target = reference + 7 * samples.advantage.view(-1, 1, 1, 1) * (states.target - old)
    assert not torch.allclose(old, reference) and not torch.allclose(old, output)
    torch.testing.assert_close(module.training_step(samples, 0).detach(), (output - target).square().mean())


def test_ram_draws_levels_for_each_sample() -> None:
    """Several for each, not those of another sample, and the same in any batch of prompts."""
    levels = attached(make("ram")).roll_out(BATCH).timesteps.view(6, 3)
    assert all(len(row.unique()) > 1 for row in levels)
    assert len(levels.unique(dim=0)) == 6
    alone = attached(make("ram")).roll_out(PromptBatch(PROMPTS[1:], BATCH.keys[1:])).timesteps.view(3, 3)
    assert torch.equal(alone, levels[3:])


def test_a_rollout_after_an_empty_one_moves_no_copy() -> None:
    module = attached(make("nft", old=DecayRamp(0.1, 0.5, start=-5)))
    moved(module)
    module.followed, before = -1, clones(adapter(module, OLD))
    seen = []
    for _ in range(2):
        module.move_copies()
        seen.append(clones(adapter(module, OLD)))
    assert all(torch.equal(seen[1][name], weight) for name, weight in seen[0].items())
    assert any(not torch.equal(before[name], weight) for name, weight in seen[0].items())


@pytest.mark.slow
@every_kind
def test_the_norm_guard_adds_its_penalty(kind: str) -> None:
    """A loss with the guard is the one without it plus the penalty of the velocities, and has another gradient."""
    losses, slopes = [], []
    free = {"nft": {"loss": NFTLoss(kl_weight=0.0)}, "awm": {"loss": MatchingLoss(kl_weight=0.0)}}  # no other reference
    module = attached(make(kind, trust_region=NormGuard(50.0), **free.get(kind, {})))
    moved(module)
    samples = module.roll_out(BATCH)
    for guard in (None, module.guard):
        module.guard = guard
        module.zero_grad()
        loss = module.training_step(samples, 0)
        loss.backward()
        losses.append(loss.item())
        slopes.append(torch.cat([weight.grad.flatten() for weight in adapter(module).values()]))
    if isinstance(samples, RenoisedGroups):
        samples = samples.samples(shared_noise=kind == "dgpo")
    states = module.renoise(samples)
    penalty = NormGuard(50.0).penalty(module.predict(samples, states), module.predict_under(None, samples, states))
    assert penalty > 0
    assert losses[1] - losses[0] == pytest.approx(penalty.item(), rel=1e-3)
    assert not torch.allclose(*slopes)


@every_kind
@pytest.mark.parametrize("std", ["all", "group"])
def test_equal_rewards_of_one_prompt_count_as_half_good(kind: str, std: str) -> None:
    """Beside another prompt whose rewards differ: the advantage is 0 and r = ½; nothing is NaN."""
    module = attached(make(kind, source_of_reward=OnePromptReward, advantage=GroupAdvantage(std)))
    moved(module)
    samples = module.roll_out(BATCH)
    equal = torch.tensor([prompt == PROMPTS[1] for prompt in samples.prompts])
    assert equal.sum() == len(samples) / 2
    assert not samples.advantage[equal].any()
    assert samples.advantage[~equal].all() and samples.advantage.isfinite().all()
    assert (optimality(samples.advantage[equal]) == 0.5).all()
    loss = module.training_step(samples, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in adapter(module).values())


def loaders(**options: Any) -> PromptLoaders:
    settings = {"batch_size": 6, "prompts_per_rollout": 2, "batches_per_epoch": 6, "seed": 1, **options}
    return PromptLoaders(PROMPTS, **settings)


@pytest.mark.slow
@every_kind
def test_copies_follow_the_policy_before_each_rollout(kind: str, tmp_path: Path) -> None:
    ramp = DecayRamp(0.1, 0.5)
    module = make(kind, **{"average" if kind == "awm" else "old": ramp})
    seen: list[tuple[int, dict[str, Tensor], dict[str, dict[str, Tensor]]]] = []
    roll_out = module.make_experience

    def watched(prompts: PromptBatch) -> RenoisedSamples | None:
        found = roll_out(prompts)
        copies = {one.name: clones(adapter(module, one.name)) for one in module.copies}
        seen.append((module.trainer.global_step, clones(adapter(module)), copies))
        return found

    module.make_experience = watched
    rows = LEVELS[kind] * (2 if kind in GROUPED else 6)  # of a rollout, one for each step
    make_trainer(tmp_path, max_steps=3).fit(module, datamodule=loaders(batch_size=rows))
    assert len(seen) > 2
    name = AVERAGE if kind == "awm" else OLD
    want = seen[0][1]
    for step, policy, copies in seen[1:]:
        decay = min(0.1 * step, 0.5)
        want = {key: decay * want[key] + (1 - decay) * policy[key] for key in want}
        for key, weight in copies[name].items():
            torch.testing.assert_close(weight, want[key])
        if kind == "awm":
            assert all(torch.equal(copies[OLD][key], weight) for key, weight in policy.items())


def clones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.slow
def test_a_checkpoint_without_the_moving_average_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make("awm", loss=MatchingLoss(average_weight=0.0)), datamodule=loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match="has no adapter 'average'"):
        make_trainer(tmp_path, max_steps=2).fit(make("awm"), datamodule=loaders(), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    rotated_after(
        2,
        [
            ("nft", {}),
            ("awm", {}),
            ("nft", {"loss": NFTLoss(space="velocity")}),
            ("awm", {"loss": MatchingLoss("uniform")}),
            ("ram", {}),
            ("ram", {"loss": RAMLoss(residual="policy")}),
            ("dgpo", {}),
            ("crd", {}),
        ],
    ),
)
def test_rewards_rise(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Above those of the untrained policy, on 16 fixed noises."""
    module = make(kind, num_samples=8, optimizer=lambda groups: torch.optim.Adam(groups, lr=2e-2), **options)
    rows = 2 * LEVELS[kind] * (1 if kind in GROUPED else 8)  # of a rollout
    data = loaders(batch_size=rows, batches_per_epoch=12)
    make_trainer(tmp_path, max_steps=12, max_epochs=-1).fit(module, datamodule=data)
    fixed = PromptBatch((PROMPTS[0],) * 16, tuple(f"fixed/{number}" for number in range(16)))
    with torch.no_grad():
        new, old = (
            sample_latents(module.policy.eval(), fixed, module.sampling, module.guidance_scale, 0, reference)
            for reference in (False, True)
        )
    rises = (new - old)[:, 0].flatten(1).mean(dim=1)
    assert rises.mean() > 3 * rises.std() / 4, rises


@pytest.mark.parametrize(
    ("steps", "share", "count"), [(10, 0.99, 9), (3, 0.99, 2), (100, 0.99, 99), (50, 0.58, 29), (100, 0.29, 29)]
)
def test_random_steps_are_distinct(steps: int, share: float, count: int) -> None:
    """Of 50 steps a share of 0.58 is 29, though floats make 28.999… of the product."""
    chosen = RandomSteps(share).choose(steps, torch.Generator().manual_seed(0)).tolist()
    assert len(chosen) == len(set(chosen)) == count and set(chosen) <= set(range(steps))


def test_stratified_steps_lie_one_in_each_range() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([StratifiedSteps().choose(14, generator) for _ in range(200)])
    edges = [1, 2, 4, 6, 8, 10, 12]
    for column, (low, high) in zip(drawn.T, pairwise(edges), strict=True):
        assert set(column.tolist()) == set(range(low, high))
