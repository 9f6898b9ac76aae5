"""Correlations within prompts of scores of noisy states with scores of finished samples: closed forms, refusals."""

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 1}, "^state_scores.samples=1 must be at least 2 and finite; samples of one prompt are compared"),
        ({"score_sigmas": ()}, r"^state_scores.score_sigmas=\[\] must be at least one noise level"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        StateScores(FirstChannelReward(), **options)


def test_what_has_no_noisy_states_is_refused(tmp_path: Path) -> None:
    pixels = PixelReward(CallableScorer(redness, name="red"))
    made, pictures = JudgedPolicy(pipeline="sd_tiny"), JudgedPolicy(images=tmp_path)
    with pytest.raises(InputError, match="state_scores needs the score of a noisy state, which PixelReward does not"):
        check_states(Sampling(4), StateScores(pixels), {"policy": made})
    with pytest.raises(InputError, match=r"state_scores: sampling\.num_inference_steps=1 leaves no noisy state to"):
        check_states(Sampling(1), StateScores(FirstChannelReward()), {})
    with pytest.raises(InputError, match="state_scores: other is a folder of pictures, without noisy states; leave it"):
        check_states(Sampling(4), StateScores(FirstChannelReward()), {"policy": made, "other": pictures})
    check_states(Sampling(4), None, {"other": pictures})
