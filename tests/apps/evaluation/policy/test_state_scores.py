"""Correlations within prompts of scores of noisy states with scores of finished samples: closed forms, refusals."""

from pathlib import Path

import numpy as np
import pytest

from latentreward.alignment import PixelReward, Sampling
from latentreward.apps.evaluation.policy.samples import JudgedPolicy
from latentreward.apps.evaluation.policy.state_scores import StateScores, check_states, within_prompts
from latentreward.core.errors import InputError
from latentreward.reward import CallableScorer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.apps.evaluation.policy.toy_scorers import redness


def test_prompts_means_do_not_count() -> None:
    """Scores of three steps and of the end: noise, half of the end's differences, their negative."""
    drawn = np.random.default_rng(3).normal(size=(2, 400, 8))
    end = drawn[0] + 20 * np.arange(400)[:, None]
    values = np.stack([drawn[1] - 5 * end.mean(axis=1, keepdims=True), drawn[0] + 3**0.5 * drawn[1], -end, end], axis=1)
    found = within_prompts(values, [f"prompt {number}" for number in range(400)])
    assert [one.value for one in found] == pytest.approx([0, 0.5, -1], abs=0.04)
    assert found[1].low < 0.5 < found[1].high


def test_what_has_no_noisy_states_is_refused(tmp_path: Path) -> None:
    pixels, first = PixelReward(CallableScorer(redness, name="red")), FirstChannelReward()
    made, pictures = JudgedPolicy(pipeline="sd_tiny"), JudgedPolicy(images=tmp_path)
    for key, check in (
        ("state_scores.samples=1", lambda: StateScores(first, samples=1)),
        (r"state_scores.score_sigmas=\[\]", lambda: StateScores(first, score_sigmas=())),
        ("PixelReward", lambda: check_states(Sampling(4), StateScores(pixels), {"policy": made})),
        ("num_inference_steps=1", lambda: check_states(Sampling(1), StateScores(first), {})),
        ("state_scores: other", lambda: check_states(Sampling(4), StateScores(first), {"other": pictures})),
    ):
        with pytest.raises(InputError, match=key):
            check()
    check_states(Sampling(4), None, {"other": pictures})
