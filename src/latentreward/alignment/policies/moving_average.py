"""Older copies of a trained adapter, beside it on the same network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.policies.policy import POLICY, Policy, add_frozen_adapter
from latentreward.core.errors import InputError, check_range

OLD, AVERAGE = "old", "average"
"""Names of copies: of the policy that samples, and of a moving average."""


@dataclass
class DecayRamp:
    """Decay d of a moving copy, old ← d · old + (1 − d) · new, as a function of the number of optimiser steps.

    d is 0 up to ``start``, rises by ``slope`` per step from there, and ends at ``most``. With ``most`` 0 the copy is
    always the newest weights.

    Attributes:
        slope: Rise per optimiser step, at least 0. DiffusionNFT: 0.001, for text rendering 0.0075.
        most: Largest decay, in [0, 1). DiffusionNFT: 0.5, for text rendering 0.999. AWM's moving average: 0.3.
        start: Optimiser step from which the decay rises. DiffusionNFT: 0, for text rendering 75. Below 0, the decay has
            risen before the run: −50 with a slope of 0.005 begins at 0.25, as in CRD.
    """

    slope: float = 0.001
    most: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        check_range("[0, inf)", "DiffusionNFT uses 0.001", slope=self.slope)
        check_range("[0, 1)", "0 keeps no older weights", most=self.most)

    def decay(self, step: int) -> float:
        """Return d after ``step`` optimiser steps."""
        return min(max(step - self.start, 0) * self.slope, self.most)


def move_towards(old: Tensor, new: Tensor, decay: float) -> None:
    """Set ``old`` to ``decay · old + (1 − decay) · new``, in place."""
    old.lerp_(new.to(old.dtype), 1 - decay) if decay else old.copy_(new)


class MovingCopy:
    """A frozen copy of a policy's adapter that follows it, as a second adapter on the policy's network.

    Checkpoints hold the copy, since :attr:`Policy.moving_adapters` names it.

    Args:
        policy: The policy, not yet sharded.
        name: Name of the copy's adapter.
        ramp: How slowly the copy follows.
    """

    def __init__(self, policy: Policy, name: str, ramp: DecayRamp) -> None:
        self.policy, self.name, self.ramp = policy, name, ramp
        settings: Any = policy.network.peft_config
        # A copy never trains, and peft would drop out its input in training mode.
        config = replace(settings[POLICY], lora_dropout=0.0)
        with torch.no_grad():
            for key, weight in add_frozen_adapter(policy.network, config, name).items():
                own = key.replace(f".{name}.", f".{POLICY}.")
                weight.data = policy.network.get_parameter(own).detach().clone()
        policy.adapters.refresh()
        policy.moving_adapters = (*policy.moving_adapters, name)

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raise InputError if a checkpoint's ``state_dict`` has no such copy, as that of another method."""
        if not any(f".{self.name}." in name for name in state_dict):
            raise InputError(f"the checkpoint has no adapter {self.name!r}; resume a run of the same settings")

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the copy towards the policy's adapter after ``step`` optimiser steps."""
        weights = dict(self.policy.network.named_parameters())
        decay = self.ramp.decay(step)
        for key, weight in weights.items():
            if f".{self.name}." in key:
                new = weights[key.replace(f".{self.name}.", f".{POLICY}.")]
                move_towards(weight, new, decay)
