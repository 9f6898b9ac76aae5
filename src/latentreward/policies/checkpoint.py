"""A trained policy from a checkpoint of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.backbones.tuning import LoRA
from latentreward.checkpoints.base_weights import BaseSample
from latentreward.checkpoints.shards import read_checkpoint
from latentreward.errors import InputError, first_line
from latentreward.policies.loading import PolicySource
from latentreward.policies.policy import POLICY, Policy
from latentreward.scoring.layouts.recipe import ONLY_IN_TRAINING

SOURCE = "policy_source"
"""Key of a checkpoint under which the fields of a :class:`PolicySource` lie, in plain values."""
ADAPTER = f".{POLICY}."
"""What names of the adapter's weights hold."""
PREFIX = "policy."
"""What names of the policy's weights begin with in a checkpoint."""


@dataclass(frozen=True)
class SavedAdapter:
    """What an alignment run has learned.

    Attributes:
        weights: By their names in a :class:`Policy`.
        source: Where the base came from, and the adapter's settings.
        base: Values of the base's weights, by which another base is told from it, if it is noted.
    """

    weights: dict[str, Tensor]
    source: PolicySource
    base: dict[str, Any] | None


def read_policy_adapter(checkpoint: Path | str) -> SavedAdapter:
    """The adapter in a checkpoint of any alignment module.

    Raises:
        InputError: If it is the checkpoint of something else, or damaged.
    """
    content = read_checkpoint(Path(checkpoint))
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items() if ADAPTER in name}
    if not weights or SOURCE not in content:
        raise InputError(f"checkpoint: {checkpoint} holds no policy and its source; give one of an alignment run")
    try:
        record = {name: value for name, value in content[SOURCE].items() if name not in ONLY_IN_TRAINING}
        source = PolicySource(**record, lora=LoRA(**content[SOURCE]["lora"]))
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"checkpoint: {checkpoint}: {SOURCE} is of another version ({first_line(error)})") from error
    return SavedAdapter(weights, source, content.get("base"))


def load_policy(checkpoint: Path | str, source: PolicySource | None = None) -> Policy:
    """The policy of an alignment run, on the CPU in evaluation mode, with the adapter that it had learned.

    Args:
        checkpoint: Lightning checkpoint of any alignment module: one file or a folder of shards, whole or of the
            trainable weights alone. With the average of ``TrainableEMA`` if ``latentreward consolidate --average=true``
            wrote it.
        source: Where the base comes from, and the adapter's shape; what the checkpoint notes by default.

    Raises:
        InputError: If it is the checkpoint of something else, or its adapter does not fit ``source``.
    """
    saved = read_policy_adapter(checkpoint)
    policy = (source or saved.source).load()
    if saved.base is not None:
        BaseSample.of(policy, policy.source).check(saved.base)
    load_adapter(policy, saved.weights, str(checkpoint))
    return policy.eval()


def load_adapter(policy: Policy, weights: Mapping[str, Tensor], origin: str) -> None:
    """Put ``weights``, by their names in ``policy``, into the adapter that trains.

    Args:
        policy: Not sharded.
        weights: All of the adapter's, and no others.
        origin: Where they come from, for messages.

    Raises:
        InputError: If one is missing, left over or of another shape.
    """
    own = {name: parameter for name, parameter in policy.named_parameters() if ADAPTER in name}
    odd = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if odd:
        raise InputError(
            f"{origin}: {odd[0]} does not fit the policy {policy.source} ({len(odd)} such weights); give the source "
            "and lora (rank, target_modules) that it was trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
