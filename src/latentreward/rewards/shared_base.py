"""A reward that is an adapter on the policy's own base runs on the policy's network: one base, many adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.checkpoints.base_weights import without_adapters

if TYPE_CHECKING:
    from latentreward.policies import Policy
    from latentreward.scoring.layouts.find import StoredReward

REWARD = "reward"
"""Name of the adapter of the first reward that shares a network; later ones get a number."""
PROBES = ("", "a photo of two cats, 50 mm")
"""Prompts by whose token ids two tokenizers are compared."""


def shares_network(stored: StoredReward, policy: Policy) -> bool:
    """Whether the reward is an adapter, or nothing, on the very weights of the policy's network."""
    outline = stored.on_meta_device
    if outline is None or outline.with_network(policy.network, policy.text_encoder) is None:
        return False
    network = outline.get_submodule(outline.network_name)
    if public(network.config) != public(policy.network.config):
        return False
    return same_frozen(stored, outline.network_name, network, policy.network, policy.source)


def shares_text(stored: StoredReward, policy: Policy) -> bool:
    """Whether the reward reads prompts by the very text encoders of the policy."""
    theirs, ours = None if stored.on_meta_device is None else stored.on_meta_device.text_encoder, policy.text_encoder
    if theirs is None or ours is None or type(theirs) is not type(ours) or theirs.num_tokens != ours.num_tokens:
        return False
    if not all(map(torch.equal, theirs.tokenize(PROBES), ours.tokenize(PROBES))):
        return False
    return same_frozen(stored, "text_encoder", theirs, ours, policy.source, adapters=False)


def same_frozen(
    stored: StoredReward, part: str, theirs: nn.Module, ours: nn.Module, source: str, adapters: bool = True
) -> bool:
    """Whether all weights of ``theirs``, which has none, are frozen ones of ``ours``.

    Args:
        stored: The reward.
        part: Its name for ``theirs``.
        theirs: Part of its outline.
        ours: The policy's part.
        source: Where that came from.
        adapters: Whether ``theirs`` may have adapters beside.
    """
    if any(p.requires_grad and not (adapters and ".lora_" in name) for name, p in theirs.named_parameters()):
        return False
    found, wanted = (dict(without_adapters(network.named_parameters())) for network in (ours, theirs))
    if any(name not in found or found[name].shape != weight.shape for name, weight in wanted.items()):
        return False
    return stored.same_base(part, {name: found[name] for name in wanted}, source)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without what only says where it came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def share_adapter(policy: Policy, network: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Give the policy's network the adapter of a reward's; None if it has none.

    What trains and what is at work stay as they are; the new weights are frozen, and neither in the policy's
    ``state_dict()`` nor missed when one is loaded.

    Args:
        policy: The policy.
        network: Network of the reward, with or without weights, whose layers have the adapter.
        weights: The adapter's tensors by their names in ``network``.

    Returns:
        Name of the adapter in the policy's network.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    layers = [name for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        return None
    taken: Any = policy.network.peft_config
    adapter = next(name for name in (f"{REWARD}{number or ''}" for number in count()) if name not in taken)
    settings: Any = network.peft_config
    config = replace(settings["default"], target_modules=layers, lora_dropout=0.0)
    trains = {parameter for parameter in policy.network.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, policy.network, adapter)
    own = {name: parameter for name, parameter in policy.network.named_parameters() if f".{adapter}." in name}
    with torch.no_grad():
        for name, parameter in own.items():
            trained = weights.get(name.replace(f".{adapter}.", ".default."))  # None where nobody reads the layer
            parameter.zero_() if trained is None else parameter.copy_(trained)
    for parameter in policy.network.parameters():
        parameter.requires_grad_(parameter in trains)
    policy.adapters.refresh()
    leave_out(policy.network, adapter)
    return adapter


def leave_out(network: nn.Module, adapter: str) -> None:
    """Keep an adapter, which comes from the reward's own checkpoint, out of what is saved and loaded."""
    mark = f".{adapter}."

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and mark in name]:
            del state[name]

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if mark not in name]

    network.register_state_dict_post_hook(drop)
    network.register_load_state_dict_post_hook(forgive)
