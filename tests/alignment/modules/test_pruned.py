"""Pruned rollouts in the methods that learn from finished samples: what they train on, log, refuse and say."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    Agreement,
    BestAndWorst,
    ClippedPolicyLoss,
    CRDModule,
    DiffusionOPSDModule,
    DiversityAdvantage,
    FlowDPPO,
    GainCredit,
    GroupAdvantage,
    MovingWindow,
    PixelReward,
    PolicySource,
    Pruning,
    PruningRule,
    RewardGuidance,
    RewardMixture,
    Sampling,
    UncertaintyGate,
)
from latentreward.alignment.modules.pruned import PrunedRollouts
from latentreward.core.contracts import PromptBatch
from latentreward.core.errors import InputError
from latentreward.diffusion import LoRA
from latentreward.reward import CallableScorer
from tests.alignment.modules.lpo_runs import make_trainer
from tests.alignment.modules.simple_reward import FirstChannelReward, OtherChannelsReward
from tests.alignment.modules.test_forward_process import BATCH, adapter, clones, loaders
from tests.alignment.modules.test_forward_process import make as make_forward
from tests.alignment.modules.test_grpo import attached, trajectory
from tests.alignment.modules.toy_rewards import BrightnessSource
from tests.tiny_pipelines import source_of

EVERY = ("nft", "awm", "ram", "trajectory")
every_kind = pytest.mark.parametrize("kind", EVERY)


def make(kind: str, **options: Any) -> Any:
    """A module with 3 samples a prompt."""
    if kind == "trajectory":
        return trajectory("sd35_tiny", **options)
    return attached(make_forward(kind, **options))


def samples_of(rows: Any) -> list[str]:
    """Keys of the samples ``PROMPT/CANDIDATE``, each once."""
    return sorted({key.rsplit("/", 1)[0] for key in rows.keys})


def equal(first: Any, second: Any) -> bool:
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("kind", [*EVERY, "dgpo"])
def test_as_many_candidates_as_samples_prune_nothing(kind: str) -> None:
    """To the bit; ρ is measured, at one more pass of the reward."""
    module = make(kind, pruning=Pruning(3, 2))
    assert equal(make(kind).roll_out(BATCH), module.roll_out(BATCH))
    passes = 8.0 if kind == "trajectory" else 4.0  # guidance takes two
    assert module.rollout_values.pop("prediction_correlation") != 0
    assert module.rollout_values == {"finished_share": 1.0, "policy_passes": passes, "reward_passes": 2.0}


@every_kind
@pytest.mark.parametrize("at_once", [None, 1])
def test_finished_samples_are_those_of_a_rollout_of_all_candidates(kind: str, at_once: int | None) -> None:
    number = "num_trajectories" if kind == "trajectory" else "num_samples"
    module, whole = make(kind, pruning=Pruning(6, 2), prompts_at_once=at_once), make(kind, **{number: 6})
    found, every = module.roll_out(BATCH), whole.roll_out(BATCH)
    assert [key.rsplit("/", 1)[0] for key in samples_of(found)] == ["0/0"] * 3 + ["0/1"] * 3
    assert len(found) == len(every) / 2
    rows = [every.keys.index(key) for key in found.keys]
    torch.testing.assert_close(found.latents, every.latents[rows], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.timesteps, every.timesteps[rows])
    passes = (2 if kind == "trajectory" else 1) * (2 * 2 + 2)
    module.rollout_values.pop("prediction_correlation")
    assert module.rollout_values == {"finished_share": 0.5, "policy_passes": passes, "reward_passes": 3.0}
    assert equal(found, make(kind, pruning=Pruning(6, 2), prompts_at_once=at_once).roll_out(BATCH))


def test_advantages_are_divided_by_the_contrast() -> None:
    """By √C in the rewards and once more in the advantages."""
    module = make("nft", num_samples=4, pruning=Pruning(12, 3), advantage=GroupAdvantage("none"))
    rows = module.roll_out(BATCH)
    first = [rows.keys.index(next(key for key in rows.keys if key.startswith(f"{one}/"))) for one in samples_of(rows)]
    rewards = 10 * rows.latents[first][:, 0].flatten(1).mean(dim=1).view(2, 4)
    contrast = module.pruned._total.contrast
    assert contrast > 1.1
    want = (rewards - rewards.mean(dim=1, keepdim=True)) / contrast
    torch.testing.assert_close(rows.advantage[first].view(2, 4), want.float(), rtol=1e-3, atol=1e-4)


def test_prompts_of_small_spread_are_left_out() -> None:
    """All but the one of the largest spread, whatever the bound."""
    whole = make("nft", pruning=Pruning(6, 2))
    whole.roll_out(BATCH)
    spreads = whole.pruned._batches[0][0].std(dim=1, correction=0).tolist()
    for bound, left in ((min(spreads) * 0.99, 2), (sum(spreads) / 2, 1), (max(spreads) * 2, 1)):
        module = make("nft", pruning=Pruning(6, 2, min_spread=bound))
        rows = module.roll_out(BATCH)
        prompts = {key.rsplit("/", 1)[0] for key in samples_of(rows)}
        assert len(prompts) == left and f"0/{spreads.index(max(spreads))}" in prompts
        assert module.rollout_values["finished_share"] == 0.5 * left / 2
        assert module.rollout_statistics.scores.shape == (1, 3, left)
        assert rows.advantage.isfinite().all() and rows.advantage.any()


class Drawn(PruningRule):
    """Keeps candidates at random."""

    def choose(self, predicted: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(predicted), generator=generator)[:count]


def test_a_rule_of_ones_own_draws_by_prompt() -> None:
    """Equal in any batch of prompts, and different for each prompt of them."""
    kept = {}
    for name, batch in (("both", BATCH), ("second", PromptBatch(BATCH.prompts[1:], BATCH.keys[1:]))):
        module = make("nft", pruning=Pruning(9, 2, rule=Drawn()))
        kept[name] = samples_of(module.roll_out(batch))
    assert kept["both"][3:] == kept["second"]
    assert [key[-1] for key in kept["both"][:3]] != [key[-1] for key in kept["both"][3:]]


def test_a_mixture_logs_the_means_of_finished_samples() -> None:
    reward = lambda scale: RewardMixture([FirstChannelReward(scale), BrightnessSource()], normalise="none")  # noqa: E731
    means = []
    for pruning in (None, Pruning(3, 2)):
        module = make("nft", source_of_reward=reward, pruning=pruning)
        module.roll_out(BATCH)
        means.append(module.rollout_log.part_means)
    assert means[0] == means[1]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("nft", {"pruning": Pruning(2, 2)}, "pruning.candidates=2 is less than num_samples=3, the samples that are"),
        ("trajectory", {"pruning": Pruning(2, 2)}, "pruning.candidates=2 is less than num_trajectories=3"),
        ("ram", {"pruning": Pruning(6, 4)}, "pruning.after_steps=4 goes beyond step 3, the last one that leaves noise"),
        ("trajectory", {"credit": GainCredit()}, "pruning takes one reward of each finished sample, and credit looks"),
        ("trajectory", {"reward_guidance": RewardGuidance()}, "and reward_guidance looks at more"),
        ("trajectory", {"advantage": DiversityAdvantage()}, "and advantage looks at more; leave one of them out, or"),
        (
            "trajectory",
            {"trust_region": UncertaintyGate(), "reward_sigmas": (0.2, 0.6), "loss": ClippedPolicyLoss(kl_weight=0.1)},
            "and trust_region looks at more",
        ),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, options: dict[str, Any], said: str) -> None:
    options = {"pruning": Pruning(6, 2), **options}
    reward = BrightnessSource() if "reward_guidance" in options else OtherChannelsReward()
    with pytest.raises(InputError, match=said):
        make(kind, source_of_reward=lambda _: reward, **options)


@every_kind
def test_a_reward_without_noise_levels_is_refused(kind: str) -> None:
    pixels = lambda _: PixelReward(CallableScorer(lambda prompts, images: torch.zeros(len(images)), name="no"))  # noqa: E731
    with pytest.raises(InputError, match="pruning needs the score of a noisy state, which PixelReward does not give"):
        make(kind, pruning=Pruning(6, 2), source_of_reward=pixels)


def test_a_method_that_compares_no_samples_is_refused() -> None:
    policy = PolicySource(source_of("sd35_tiny"), lora=LoRA(rank=4, alpha=4))
    with pytest.raises(InputError, match="pruning: the gradient of DiffusionOPSDModule is not in proportion"):
        DiffusionOPSDModule(policy, BrightnessSource(), sampling=Sampling(4), pruning=Pruning(6, 2))
    with pytest.raises(InputError, match="pruning: the gradient of CRDModule is not in proportion"):
        CRDModule(policy, BrightnessSource(), sampling=Sampling(4), num_samples=3, pruning=Pruning(6, 2))


@pytest.mark.parametrize("options", [{"window": MovingWindow(2, every=1)}, {"trust_region": FlowDPPO()}])
def test_windows_and_rules_of_steps_fit(options: dict[str, Any]) -> None:
    """Old means are those of the finished trajectories."""
    rows = trajectory("sd35_tiny", pruning=Pruning(6, 2), **options).roll_out(BATCH)
    assert len(samples_of(rows)) == 6
    assert len(rows) == 6 * (2 if "window" in options else 4)


@pytest.mark.parametrize(("after_steps", "candidates", "says"), [(3, 9, True), (3, 3, False), (1, 6, False)])
def test_a_correlation_too_low_is_said_once(
    after_steps: int, candidates: int, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rule that keeps anything, M is 1 and nothing pays; nothing is said where nothing is pruned or trained."""
    monkeypatch.setattr("latentreward.alignment.modules.pruned.ENOUGH", 12)
    rule: PruningRule = Drawn() if says else BestAndWorst()
    module = make("nft", pruning=Pruning(candidates, after_steps, rule=rule))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(4):
            module.roll_out(PromptBatch(BATCH.prompts, (f"{number}/0", f"{number}/1")))
    said = [str(one.message) for one in caught if "pruning: scores after step" in str(one.message)]
    assert len(said) == says
    assert all("correlate with rewards by only ρ = " in one and "\n" not in one and len(one) < 260 for one in said)


@pytest.mark.parametrize(("sign", "says"), [(1, False), (-1, False), (0, True)])
def test_a_correlation_counts_whatever_its_sign(sign: int, says: bool) -> None:
    drawn = torch.randn(2, 60, 12, generator=torch.Generator().manual_seed(1))
    kept = torch.stack([BestAndWorst().choose(row, 6, torch.Generator()) for row in drawn[0]])
    pruned = PrunedRollouts(Pruning(12, 2), 6, 1)
    pruned._total = Agreement.of(drawn[0], kept, (sign * drawn[0] if sign else drawn[1]).gather(1, kept))
    module: Any = SimpleNamespace(sampling=Sampling(10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruned.begin(module, 0.0)
    assert len(caught) == says


@pytest.mark.parametrize(("kind", "passes"), [("nft", 15), ("ram", 15), ("awm", 12)])
def test_passes_of_training_are_those_of_all_levels(kind: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(PrunedRollouts, "begin", lambda self, module, trained: told.append(trained))
    make(kind, pruning=Pruning(6, 2)).roll_out(BATCH)
    assert told == [passes]


@pytest.mark.parametrize(("kind", "levels", "passes"), [("nft", 2, 4.0), ("trajectory", 3, 5.0)])
def test_passes_count_every_level_of_the_reward(kind: str, levels: int, passes: float) -> None:
    sigmas = (0.1, 0.3, 0.6)[:levels]
    module = make(kind, source_of_reward=OtherChannelsReward, pruning=Pruning(6, 2), reward_sigmas=sigmas)
    module.roll_out(BATCH)
    assert module.rollout_values["reward_passes"] == passes


def test_values_are_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make_forward("nft", pruning=Pruning(6, 2)), datamodule=loaders(batch_size=18))
    logged = {name: value.item() for name, value in trainer.logged_metrics.items() if name.startswith("rollout/")}
    assert logged["rollout/policy_passes"] == 6 and logged["rollout/reward_passes"] == 3
    assert logged["rollout/finished_share"] == 0.5
    assert -1 <= logged["rollout/prediction_correlation"] <= 1


def run(kind: str, folder: Path, stop: int, resumed: Path | None = None, **options: Any) -> dict[str, Tensor]:
    settings = {"optimizer": partial(torch.optim.SGD, lr=0.05), **options}
    make_one: Callable[..., Any] = (
        partial(make_forward, kind) if kind != "trajectory" else partial(trajectory, "sd35_tiny")
    )
    module = make_one(**settings)
    for name in ("log", "log_dict"):
        vars(module).pop(name, None)
    trainer = make_trainer(folder, max_steps=stop)
    trainer.fit(module, datamodule=loaders(), ckpt_path=resumed)
    trainer.save_checkpoint(folder / f"{stop}.ckpt")
    return clones(adapter(module))


@pytest.mark.slow
@every_kind
def test_a_resumed_run_equals_the_whole_one(kind: str, tmp_path: Path) -> None:
    """Stopped in the middle of a rollout's rows."""
    pruned = {"pruning": Pruning(6, 2)}
    whole = run(kind, tmp_path, 5, **pruned)
    run(kind, tmp_path, 2, **pruned)
    resumed = run(kind, tmp_path, 5, tmp_path / "2.ckpt", **pruned)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.slow
@every_kind
def test_a_run_that_prunes_nothing_equals_one_without(kind: str, tmp_path: Path) -> None:
    plain, same = run(kind, tmp_path, 3), run(kind, tmp_path, 3, pruning=Pruning(3, 1))
    assert all(torch.equal(same[name], weight) for name, weight in plain.items())
