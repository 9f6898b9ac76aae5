"""Trajectory GRPO with credit of steps, windows, trust regions and advantages of several rewards."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    GDPO,
    ClippedPolicyLoss,
    DiversityAdvantage,
    FlowDPPO,
    GainCredit,
    GroupAdvantage,
    GRPOGuard,
    MovingWindow,
    NormGuard,
    OutcomeProcessLoss,
    RankGate,
    RewardMixture,
    Sampling,
    StateCredit,
    TrajectoryGRPOModule,
    TurningPointCredit,
)
from latentreward.core.contracts import StepSamples, join_rows
from latentreward.core.errors import InputError
from latentreward.data.alignment.experience import as_plain, from_plain
from tests.alignment.modules.simple_reward import FirstChannelReward, OtherChannelsReward
from tests.alignment.modules.test_grpo import BATCH, stepwise, trajectory
from tests.marks import rotated_after, slow_after

KL = ClippedPolicyLoss(kl_weight=0.1)
MIXED = RewardMixture([FirstChannelReward(10.0), FirstChannelReward(-3.0)], normalise="none")
SETTINGS: dict[str, dict[str, Any]] = {
    "gains": {"credit": GainCredit(0.5)},
    "dppo": {"trust_region": [FlowDPPO(), NormGuard(0.1)], "loss": ClippedPolicyLoss(max_advantage=None)},
    "process": {"credit": StateCredit(), "loss": OutcomeProcessLoss(kl_weight=0.1)},
    "gate": {"trust_region": RankGate(), "loss": KL},
    "turning": {"credit": TurningPointCredit()},
    "window": {"window": MovingWindow(2, every=1)},
    "guard": {"trust_region": GRPOGuard()},
    "diverse": {"advantage": DiversityAdvantage()},
    "tempflow": {"loss": ClippedPolicyLoss(kl_weight=0.1, step_weight="noise")},
    "cps": {"sampling": Sampling(4, flow_noise="cps")},
}


def mixture(**options: Any) -> TrajectoryGRPOModule:
    return trajectory("sd35_tiny", source_of_reward=lambda scale: MIXED, **options)


@pytest.fixture(scope="module")
def plain() -> tuple[TrajectoryGRPOModule, StepSamples]:
    """Module without further settings, and rows of one of its rollouts."""
    module = trajectory("sd35_tiny")
    return module, module.roll_out(BATCH)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *rotated_after(4, [("sd35_tiny", setting) for setting in SETTINGS]),
        *rotated_after(0, [("sd15", setting) for setting in SETTINGS if setting != "cps"]),  # CPS is a rule of flows
    ],
)
def test_every_setting_learns_from_its_rows(name: str, setting: str) -> None:
    options = SETTINGS[setting] | ({"source_of_reward": lambda scale: MIXED} if setting == "gate" else {})
    module = trajectory(name, **options)
    samples = module.roll_out(BATCH)
    again = from_plain(as_plain(samples), StepSamples)
    for field in fields(StepSamples):
        value, stored = getattr(samples, field.name), getattr(again, field.name)
        assert torch.equal(value, stored) if isinstance(value, Tensor) else value == stored
    loss = module.training_step(samples, 0)
    loss.backward()
    slopes = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


def test_credit_is_the_gain_of_the_states_rewards() -> None:
    module = trajectory("sd35_tiny", credit=GainCredit(0.0), advantage=GroupAdvantage("none"))
    samples = module.roll_out(BATCH)
    states = samples.latents.unflatten(0, (-1, 6))
    following = samples.next_latents[:, 0].unflatten(0, (-1, 6))
    gains = 10 * (following - states)[:, :, 0].flatten(2).mean(dim=2)[:-1]  # the last state is scored with noise
    gains = gains.unflatten(1, (2, 3)).double()
    expected = (gains - gains.mean(dim=2, keepdim=True)).flatten(1)
    found = samples.advantage[:, 0].unflatten(0, (-1, 6))[: len(expected)].double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_window_has_noise_in_its_steps_alone(plain: tuple[TrajectoryGRPOModule, StepSamples]) -> None:
    whole, rows = plain
    samples = trajectory("sd35_tiny", window=MovingWindow(2)).roll_out(BATCH)
    assert len(samples) == 2 * 6
    assert sorted(set(samples.timesteps.tolist()), reverse=True) == whole.sampler.timesteps[:2].tolist()
    assert len(rows) == 4 * 6


def test_the_guard_starts_as_plain_grpo_up_to_its_scale(plain: tuple[TrajectoryGRPOModule, StepSamples]) -> None:
    (module, samples), guarded = plain, trajectory("sd35_tiny", trust_region=GRPOGuard(per_step=True))
    guarded_samples = guarded.roll_out(BATCH)
    assert torch.equal(samples.advantage, guarded_samples.advantage)
    transition = guarded.transition(guarded_samples)
    torch.testing.assert_close(transition.mean, guarded_samples.old_mean, atol=1e-5, rtol=1e-5)
    losses = [one.training_step(rows, 0) for one, rows in ((module, samples), (guarded, guarded_samples))]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-3)


def test_the_gate_holds_whole_trajectories() -> None:
    module = mixture(**SETTINGS["gate"])
    samples = module.roll_out(BATCH)
    held = samples.held[:, 0].unflatten(0, (-1, 6))
    assert held.any()
    assert not held.all()
    assert (held == held[0]).all()


def test_rows_of_other_settings_are_not_joined(plain: tuple[TrajectoryGRPOModule, StepSamples]) -> None:
    guarded = trajectory("sd35_tiny", trust_region=GRPOGuard()).roll_out(BATCH)
    with pytest.raises(InputError, match="made with another loss or trust_region"):
        join_rows([plain[1], guarded])


def test_rewards_of_a_mixture_are_normalised_one_by_one() -> None:
    samples = mixture(advantage=GDPO([1.0, 0.0])).roll_out(BATCH)
    other = mixture(advantage=GDPO([0.0, 1.0])).roll_out(BATCH)
    torch.testing.assert_close(samples.advantage, -other.advantage, atol=1e-4, rtol=1e-4)


def weighed(*weights: float, **options: Any) -> TrajectoryGRPOModule:
    parts = [FirstChannelReward(10.0), OtherChannelsReward(-3.0)]
    source_of_reward = RewardMixture(parts, weights, normalise="none")
    return trajectory("sd35_tiny", source_of_reward=lambda scale: source_of_reward, **options)


@pytest.mark.slow
def test_a_penalty_of_a_mixture_stays_one_under_gdpo() -> None:
    """GDPO weighs the rewards as the mixture does, unless it has weights of its own."""
    found = {weights: weighed(*weights, advantage=GDPO()).roll_out(BATCH).advantage for weights in ((1, 2), (1, -2))}
    for weights, advantage in found.items():
        own = weighed(1, 1, advantage=GDPO([*weights])).roll_out(BATCH).advantage
        torch.testing.assert_close(advantage, own, atol=1e-5, rtol=1e-5)
    assert (found[1, 2] - found[1, -2]).abs().max() > 0.1
    ranks = [weighed(1, weight, trust_region=RankGate(), loss=KL).roll_out(BATCH).held for weight in (1, 2, -1)]
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])


def test_each_reward_of_a_mixture_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mean before normalisation: under ``group`` the mean of the sums is always 0."""
    module, logged = weighed(1, 1), {}
    rows = module.roll_out(BATCH)
    monkeypatch.setattr(module, "log_dict", lambda values, **options: logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.update({name: value}))
    module.rollout_log.on_train_batch_start(module.trainer, module, rows, 0)
    assert logged["rollout/score"] == pytest.approx(logged["rollout/reward_1"] + logged["rollout/reward_2"], rel=1e-4)
    assert logged["rollout/reward_1"] != 0.0


@pytest.mark.parametrize(
    "options",
    slow_after(
        1,
        [
            {"advantage": GDPO()},
            {"trust_region": RankGate(), "loss": KL},
            {"advantage": GDPO(), "trust_region": RankGate(), "loss": KL},
        ],
    ),
    ids=["gdpo", "rank gate", "both"],
)
def test_finished_samples_are_scored_once_by_each_reward(options: dict[str, Any]) -> None:
    module = mixture(**options)
    calls = []
    for reward in module.reward.rewards:
        reward.register_forward_pre_hook(lambda *given: calls.append(given))
    plain = mixture().roll_out(BATCH)
    samples = module.roll_out(BATCH)
    assert len(calls) == 2
    assert torch.equal(samples.latents, plain.latents)
    if "advantage" not in options:
        assert torch.equal(samples.advantage, plain.advantage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [{"trust_region": GRPOGuard()}, {"loss": OutcomeProcessLoss(), "credit": StateCredit()}]
)
def test_rows_of_a_checkpoint_that_other_settings_made_are_refused(other: dict[str, Any]) -> None:
    """Before a step is taken, in both directions."""
    plain, changed = trajectory("sd35_tiny"), trajectory("sd35_tiny", **other)
    for module, source_of_rows in ((plain, changed), (changed, plain), (stepwise("sd35_tiny"), changed)):
        module.check_experience(module.roll_out(BATCH))
        with pytest.raises(
            InputError, match=r"rows left of its rollouts .* another method, loss, credit or trust_region"
        ):
            module.check_experience(source_of_rows.roll_out(BATCH))


def test_rows_depend_on_the_noise_of_their_steps() -> None:
    settings = trajectory("sd35_tiny").rollout_settings()
    assert settings["sampling.noise_level"] == 0.7
    assert {"sampling.num_inference_steps", "sampling.eta", "sampling.flow_noise", "guidance_scale"} < set(settings)
