"""Trajectory GRPO with credit of steps, windows, trust regions and advantages of several rewards."""

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from latentreward.alignment import (
    GDPO,
    AlignmentModule,
    ClippedPolicyLoss,
    Credit,
    DiversityAdvantage,
    FlowDPPO,
    GainCredit,
    GroupAdvantage,
    GRPOGuard,
    KLGate,
    MovingWindow,
    NormGuard,
    OutcomeProcessLoss,
    Penalty,
    PixelReward,
    Policy,
    PolicySource,
    RankGate,
    RewardGuidance,
    RewardMixture,
    Sampling,
    StateCredit,
    StepwiseGRPOModule,
    TrajectoryGRPOModule,
    TrustRegion,
    TurningPointCredit,
    UncertaintyGate,
)
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.contracts import StepSamples, join_rows
from latentreward.core.errors import InputError
from latentreward.data.alignment.experience import as_plain, from_plain
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.reward import StepAwareScorer
from tests.alignment.modules.batches import lrm
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward, OtherChannelsReward
from tests.alignment.modules.test_grpo import BATCH, PROMPTS, source, stepwise, trajectory
from tests.marks import rotated_after, slow_after

KL = ClippedPolicyLoss(kl_weight=0.1)
MIXED = RewardMixture([FirstChannelReward(10.0), FirstChannelReward(-3.0)], normalise="none")
SETTINGS: dict[str, dict[str, Any]] = {
    "gains": {"credit": GainCredit(0.5)},
    "dppo": {"trust_region": [FlowDPPO(), NormGuard(0.1)], "loss": ClippedPolicyLoss(max_advantage=None)},
    "process": {"credit": StateCredit(), "loss": OutcomeProcessLoss(kl_weight=0.1)},
    "uncertain": {"trust_region": UncertaintyGate(), "loss": KL, "reward_sigmas": (0.3, 0.6)},
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
    options = SETTINGS[setting]
    reward = OtherChannelsReward if setting == "uncertain" else FirstChannelReward
    module = trajectory(name, source_of_reward=reward, **options)
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


def test_without_settings_the_rows_hold_nothing_more() -> None:
    samples = trajectory().roll_out(BATCH)
    assert samples.process is samples.old_mean is samples.held is None


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


class OwnReward(FirstChannelReward):
    """A reward model with a network of its own, of the policy's noise process or of another one."""

    uses_sigmas = True

    def load(self, policy: Policy) -> LatentScorer:
        return LatentScorer(lrm("sd15").model.requires_grad_(False), policy.noise_process)


@pytest.mark.parametrize(
    ("name", "credit", "sigmas", "last"),
    [
        ("sd15", GainCredit(), (0.4, 0.6), 0.0414),  # √(1 − ᾱ) of timestep 1
        ("sd15", GainCredit(), (0.4, 0.0414), None),
        ("sd15", StateCredit(), (0.4,), None),
        ("sd15", None, (0.4,), None),
        ("sd35_tiny", TurningPointCredit(), (0.4,), 0.0292),  # σ 0.009 of a flow: the least level of the reward
        ("sd35_tiny", TurningPointCredit(), (0.02,), None),  # scored at that level too
    ],
)
def test_finished_latents_that_are_noisier_than_the_last_state_are_warned_of(
    name: str, credit: Credit | None, sigmas: tuple[float, ...], last: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trajectory(name, source_of_reward=OwnReward, credit=credit, reward_sigmas=sigmas)
    monkeypatch.setattr(AlignmentModule, "on_fit_start", lambda module: None)  # scores, for which this has no trainer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.on_fit_start()
    found = [str(one.message) for one in caught if "credit compares" in str(one.message)]
    assert len(found) == (last is not None)
    for text in found:
        assert text.startswith(f"credit compares the finished latents at σ {min(sigmas):g}, the least of reward_sigmas")
        assert float(text.partition("down to σ ")[2].partition(";")[0]) == pytest.approx(last, abs=2e-3)
        assert text.endswith("set reward_sigmas to the least noise level that the reward was trained at")


def test_gains_change_nothing_among_candidates_of_one_state() -> None:
    """A gain subtracts the reward of the state, which all candidates of step-wise GRPO share."""
    samples = stepwise().roll_out(BATCH)
    scores = 10 * samples.next_latents[:, :, 0].flatten(2).mean(dim=2).double()
    before = 10 * samples.latents[:, 0].flatten(1).mean(dim=1, keepdim=True).double()
    groups = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    rule = GroupAdvantage()
    plain, gains = (rule(values.flatten(), groups) for values in (scores, scores - before))
    torch.testing.assert_close(plain, gains, atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError):
        StepwiseGRPOModule(source("sd15"), FirstChannelReward(), credit=GainCredit())


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
    module = trajectory("sd35_tiny", source_of_reward=OtherChannelsReward, **SETTINGS["uncertain"])
    samples = module.roll_out(BATCH)
    held = samples.held[:, 0].unflatten(0, (-1, 6))
    assert held.any()
    assert not held.all()
    assert (held == held[0]).all()


def test_rows_of_other_settings_are_not_joined(plain: tuple[TrajectoryGRPOModule, StepSamples]) -> None:
    guarded = trajectory("sd35_tiny", trust_region=GRPOGuard()).roll_out(BATCH)
    with pytest.raises(InputError, match="made with another loss or trust_region"):
        join_rows([plain[1], guarded])


def test_a_mixture_is_recorded_as_before() -> None:
    assert "parts" not in vars(MIXED)
    assert MIXED.parts == 2


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


class Pull(Penalty):
    def penalty(self, prediction: Tensor, reference: Tensor) -> Tensor:
        return 7.0 * (prediction - reference - 1).square().mean()


class Never(KLGate):
    takes = "rewards"

    def opens(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)


class Sides(Pull):
    def penalty(self, prediction: Tensor, reference: Tensor) -> Tensor:
        return (prediction - reference).flatten(1).mean(dim=1)


class Base(TrustRegion):
    kind = "penalty"


class Unknown(Never):
    takes = "scores"


@pytest.mark.slow
def test_rules_of_a_users_own_act() -> None:
    plain, pulled = (trajectory("sd35_tiny", trust_region=rule) for rule in (None, Pull()))
    rows = plain.roll_out(BATCH)
    difference = pulled.training_step(rows, 0) - plain.training_step(rows, 0)
    assert difference.item() == pytest.approx(7.0, rel=1e-4)
    gated = trajectory("sd35_tiny", trust_region=Never(), loss=KL).roll_out(BATCH)
    assert not gated.held.any()


class WrongShape(GroupAdvantage):
    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return super().__call__(rewards, groups)[:3]


class NotFinite(GainCredit):
    def __call__(self, rewards: Tensor) -> Tensor:
        return super().__call__(rewards) * torch.nan


class TooShort(GainCredit):
    def __call__(self, rewards: Tensor) -> Tensor:
        return super().__call__(rewards)[:, :1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": WrongShape()}, r"WrongShape\.__call__ returned \(3,\); it must be a tensor \(\d+,\)"),
        ({"credit": NotFinite()}, r"NotFinite\.__call__ returned nan; it must be finite numbers"),
        ({"credit": TooShort()}, r"TooShort\.__call__ returned \(\d+, 1\); it must be a tensor \(\d+, \d\)"),
    ],
    ids=["advantage", "nan", "credit"],
)
def test_rules_of_a_users_own_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trajectory("sd35_tiny", **options).roll_out(BATCH)


def test_rules_that_nothing_calls_are_refused() -> None:
    with pytest.raises(InputError, match="Base is neither a RatioRule nor a KLGate nor a Penalty"):
        trajectory("sd35_tiny", trust_region=Base())
    with pytest.raises(InputError, match=r"Unknown\.takes is 'scores'; it must be rewards, levels or parts"):
        trajectory("sd35_tiny", trust_region=Unknown(), loss=KL)
    module = trajectory("sd35_tiny", trust_region=Sides())
    rows = module.roll_out(BATCH)
    with pytest.raises(InputError, match=r"Sides\.penalty returned \(\d+,\); it must be a scalar tensor"):
        module.training_step(rows, 0)


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


def test_a_gate_changes_no_reward() -> None:
    """Also where the score of several levels is not the mean of their scores, as of an ensemble of tokens."""
    options = {"loss": KL, "reward_sigmas": (0.3, 0.6), "source_of_reward": OtherChannelsReward}
    gated = trajectory("sd35_tiny", trust_region=UncertaintyGate(), **options).roll_out(BATCH)
    plain = trajectory("sd35_tiny", **options).roll_out(BATCH)
    assert torch.equal(gated.advantage, plain.advantage)


def test_a_gate_of_levels_goes_with_advantages_of_several_rewards() -> None:
    levels = RewardMixture([OtherChannelsReward(10.0), FirstChannelReward(-3.0)], normalise="none")
    options = {"loss": KL, "reward_sigmas": (0.3, 0.6), "trust_region": UncertaintyGate(), "advantage": GDPO()}
    samples = trajectory("sd35_tiny", source_of_reward=lambda scale: levels, **options).roll_out(BATCH)
    assert samples.held.any() and not samples.held.all()


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


def test_step_wise_grpo_has_one_advantage() -> None:
    with pytest.raises(InputError, match="StepwiseGRPOModule has one; take ClippedPolicyLoss"):
        stepwise("sd35_tiny", loss=OutcomeProcessLoss())


@pytest.mark.slow
def test_the_rank_gate_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = mixture(trust_region=RankGate(), loss=KL)
    del module.log, module.log_dict
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=PromptLoaders(PROMPTS, batch_size=4, prompts_per_rollout=2, batches_per_epoch=4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert len(checkpoint["trust_region"]["seen"]) == 1
    other = mixture(trust_region=RankGate(), loss=KL)
    other.on_load_checkpoint(checkpoint)
    assert other.gate.state() == module.gate.state()


@pytest.mark.slow
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path) -> None:
    """With a gate that adapts and a window that moves, stopped in the middle of a rollout's rows."""
    results = []
    for stop, resumed in ((8, None), (4, None), (8, tmp_path / "4.ckpt")):
        options = {"trust_region": [RankGate(), GRPOGuard()], "window": MovingWindow(2, every=2), "loss": KL}
        module = mixture(**options, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05))
        del module.log, module.log_dict
        trainer = make_trainer(tmp_path, max_steps=stop)
        data = PromptLoaders(PROMPTS, batch_size=4, prompts_per_rollout=2, batches_per_epoch=8, seed=1)
        trainer.fit(module, datamodule=data, ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / f"{stop}.ckpt")
        named = module.policy.network.named_parameters()
        results.append((module.gate.state(), {name: one.clone() for name, one in named if one.requires_grad}))
    (gate, whole), (stopped, before), (gate_again, again) = results
    assert len(gate["seen"]) > len(stopped["seen"]) > 0
    assert gate == gate_again
    assert any(not torch.equal(before[name], weight) for name, weight in whole.items())
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_region": [GRPOGuard(), FlowDPPO()]}, "GRPOGuard and FlowDPPO exclude each other"),
        ({"trust_region": UncertaintyGate(), "reward_sigmas": (0.3, 0.6)}, r"set loss\.kl_weight above 0"),
        ({"trust_region": UncertaintyGate(), "loss": KL}, "give reward_sigmas two or more"),
        (
            {"trust_region": UncertaintyGate(), "loss": KL, "reward_sigmas": (0.4, 0.4)},
            r"reward_sigmas=\[0.4, 0.4\] must be at least one noise level in \[0, 1\], each once",
        ),
        (
            {
                "trust_region": UncertaintyGate(),
                "loss": KL,
                "reward_sigmas": (0.3, 0.6),
                "num_trajectories": 2,
                "source_of_reward": OtherChannelsReward,
            },
            "num_trajectories=2: UncertaintyGate compares z-scores",
        ),
        ({"advantage": GDPO()}, "GDPO normalises rewards one by one; take a RewardMixture"),
        (
            {"advantage": GDPO([1.0]), "source_of_reward": lambda scale: MIXED},
            r"advantage\.weights=\[1\.0\] for 2 rewards; give one for each",
        ),
        (
            {"trust_region": UncertaintyGate(), "loss": KL, "reward_sigmas": (0.3, 0.6)},
            "FirstChannelReward does not score",
        ),
        ({"trust_region": RankGate(), "loss": KL}, "take a RewardMixture"),
        ({"trust_region": GRPOGuard(), "sampling": Sampling(4, flow_noise="cps")}, "corrects Gaussian log-prob"),
        (
            {"advantage": GDPO(), "credit": GainCredit(), "source_of_reward": lambda scale: MIXED},
            "GDPO takes each reward of a mixture",
        ),
        ({"trust_region": GRPOGuard(), "loss": OutcomeProcessLoss(), "credit": StateCredit()}, "no form for loss"),
        ({"loss": OutcomeProcessLoss()}, "set credit: StateCredit"),
        ({"window": MovingWindow(2), "reward_guidance": RewardGuidance()}, "leave one of them out"),
        (
            {
                "reward_guidance": RewardGuidance(),
                "source_of_reward": lambda scale: RewardMixture([FirstChannelReward(scale)], normalise="group"),
            },
            "RewardMixture normalises scores within a prompt; set normalise: none or running",
        ),
        (
            {
                "credit": GainCredit(),
                "source_of_reward": lambda scale: RewardMixture([FirstChannelReward(scale)], normalise="running"),
            },
            "credit scores noisy states too, which a RewardMixture with normalise: running would count",
        ),
        (
            {
                "trust_region": UncertaintyGate(),
                "loss": KL,
                "reward_sigmas": (0.3, 0.6),
                "source_of_reward": lambda scale: RewardMixture([OwnReward(scale)], normalise="running"),
            },
            "trust_region scores each sample at each level too, which a RewardMixture with normalise: running",
        ),
        ({"window": MovingWindow(9)}, r"window\.size=9 must lie between 1 and 4"),
        ({"sampling": Sampling(1)}, "training needs at least 2"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_weights_are_loaded(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicySource, "load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message):
        trajectory("sd35_tiny", **options)


def test_credit_needs_the_score_of_a_state() -> None:
    with pytest.raises(InputError, match="credit needs the score of a noisy state"):
        TrajectoryGRPOModule(source("sd15"), PixelReward(StepAwareScorer()), credit=GainCredit())
