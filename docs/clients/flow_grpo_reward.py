"""Reward of a ``latentreward serve`` for flow_grpo.

Copy this file and latentreward_client.py beside ``flow_grpo/``, add ``"latentreward": latentreward_score`` to the dict
``score_functions`` in ``multi_score`` of ``flow_grpo/rewards.py``, and set ``config.reward_fn`` to
``{"latentreward": 1.0}``.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from latentreward_client import RewardClient


def latentreward_score(device: Any) -> Callable[..., tuple[list[float], dict[str, Any]]]:
    """Return flow_grpo's reward function; the address is the environment variable LATENTREWARD_URL."""
    client = RewardClient(
        os.environ["LATENTREWARD_URL"],
        os.environ.get("LATENTREWARD_NAME"),
        os.environ.get("LATENTREWARD_TOKEN"),
    )

    def score(images: Any, prompts: Sequence[str], metadata: Any) -> tuple[list[float], dict[str, Any]]:
        return client.score_images(prompts, images).tolist(), {}

    return score
