"""Pruned rollouts in the methods that learn from finished samples: what they train on, log, refuse and say."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from latentreward.alignment import (
    FlowDPPO,
    GroupAdvantage,
    MovingWindow,
    Pruning,
    PruningRule,
)
from latentreward.core.contracts import PromptBatch
from tests.alignment.modules.test_forward_process import BATCH
from tests.alignment.modules.test_forward_process import make as make_forward
from tests.alignment.modules.test_grpo import attached, trajectory

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
    assert module.rollout_values["prediction_correlation"] != 0


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
    assert equal(found, make(kind, pruning=Pruning(6, 2), prompts_at_once=at_once).roll_out(BATCH))


def test_advantages_are_divided_by_the_contrast() -> None:
    """By √C in the rewards and once more in the advantages."""
    module = make("nft", num_samples=4, pruning=Pruning(12, 3), advantage=GroupAdvantage("none"))
    rows = module.roll_out(BATCH)
    first = [rows.keys.index(next(key for key in rows.keys if key.startswith(f"{one}/"))) for one in samples_of(rows)]
    rewards = 10 * rows.latents[first][:, 0].flatten(1).mean(dim=1).view(2, 4)
    contrast = module.rollout.agreement.contrast
    assert contrast > 1.1
    want = (rewards - rewards.mean(dim=1, keepdim=True)) / contrast
    torch.testing.assert_close(rows.advantage[first].view(2, 4), want.float(), rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("options", [{"window": MovingWindow(2, every=1)}, {"trust_region": FlowDPPO()}])
def test_windows_and_rules_of_steps_fit(options: dict[str, Any]) -> None:
    """Old means are those of the finished trajectories."""
    rows = trajectory("sd35_tiny", pruning=Pruning(6, 2), **options).roll_out(BATCH)
    assert len(samples_of(rows)) == 6
    assert len(rows) == 6 * (2 if "window" in options else 4)
