"""Reward of a ``latentreward serve`` for loops in the manner of DDPO: ddpo-pytorch, and trl's ``DDPOTrainer``.

ddpo-pytorch: copy this file and latentreward_client.py beside ``ddpo_pytorch/``, import ``latentreward`` in
``ddpo_pytorch/rewards.py`` and set ``config.reward_fn = "latentreward"``. trl: pass ``latentreward()`` as
``reward_function``, with ``async_reward_computation=False``, as that setting expects futures.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from latentreward_client import RewardClient


def latentreward() -> Callable[..., tuple[np.ndarray, dict[str, Any]]]:
    """Return the reward function; the address is the environment variable LATENTREWARD_URL."""
    client = RewardClient(
        os.environ["LATENTREWARD_URL"],
        os.environ.get("LATENTREWARD_NAME"),
        os.environ.get("LATENTREWARD_TOKEN"),
    )

    def score(images: Any, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return client.score_images(prompts, images).numpy(), {}

    return score
