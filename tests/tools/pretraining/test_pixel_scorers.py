"""The shipped pixel scorers: by their short names, as good as stated, and independent; and that their training runs."""

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentreward.reward import CLIPScorer, PickScorer, StepAwareScorer
from latentreward.tinyworld.pairs import draw_pairs
from tools.pretraining.pixel_scorers import RECIPES, PairTable, accuracy, predict_pictures
from tools.pretraining.vae import normalize_pictures
from tools.pretraining.worlds import CLEAR_GAP

SCORERS = Path(str(files("latentreward.tinyworld"))) / "scorers"
SLACK = 0.08
"""Two standard errors of the accuracies over 1200 and 300 pairs, and room for another machine."""


def stated(name: str) -> dict[str, Any]:
    return json.loads((SCORERS / name / "recipe.json").read_text())


@cache
def table() -> PairTable:
    """Held-out pairs, not those that the stated figures were measured on."""
    return PairTable.of(draw_pairs("validation", 400, np.random.default_rng(77)))


def finished(pairs: PairTable) -> torch.Tensor:
    return normalize_pictures(pairs.pictures)


def prompts_of(pairs: PairTable) -> list[str]:
    return [pair.caption for pair in draw_pairs("validation", len(pairs.label), np.random.default_rng(77))]


def test_shipped_scorers_are_small() -> None:
    assert sum(path.stat().st_size for path in SCORERS.rglob("*") if path.is_file()) <= 6e6


def test_they_learned_from_different_pairs_and_from_those_of_no_reward() -> None:
    seeds = {name: stated(name)["recipe"]["seed"] for name in RECIPES}
    assert len(set(seeds.values())) == len(seeds)
    assert 0 not in seeds.values()  # the seed of TinyWorldDataModule


@pytest.mark.rotated
@pytest.mark.slow
def test_the_held_out_scorer_orders_pairs_as_stated() -> None:
    pairs = table()
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pairs.pictures.flatten(0, 1)]
    prompts = [prompt for prompt in prompts_of(pairs) for _ in range(2)]
    clear = pairs.gap.abs() > CLEAR_GAP
    for scorer in (
        PickScorer("held_out_tiny", device="cpu", batch_size=64),
        CLIPScorer("held_out_tiny", device="cpu", batch_size=64),
    ):
        first, second = scorer(prompts, images).view(-1, 2).T
        right = (first - second).sign() == pairs.gap.sign()
        assert right[clear].float().mean() > stated("held_out_tiny")["figures"]["drawn"] - SLACK
    assert "/" not in scorer.identity()  # no path of this machine


@pytest.mark.rotated
@pytest.mark.slow
def test_the_step_aware_scorer_orders_pairs_as_stated() -> None:
    network, figures, pairs = StepAwareScorer("spm_tiny", device="cpu").load(), stated("spm_tiny")["figures"], table()
    zeros = torch.zeros(len(pairs.label))
    assert accuracy(network, pairs, finished(pairs), zeros) > figures["drawn"] - SLACK
    recipe = replace(RECIPES["spm_tiny"], seed=5)
    for timestep in (251, 801):
        pixels, timesteps = predict_pictures(pairs, recipe, torch.full_like(zeros, timestep).long())
        assert accuracy(network, pairs, pixels, timesteps) > figures[f"t{timestep}"] - SLACK
