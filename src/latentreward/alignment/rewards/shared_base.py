"""Sharing of one network between the policy and rewards that are adapters on the same base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentreward.alignment.policies.policy import add_frozen_adapter
from latentreward.core.checkpoints.base_weights import is_quantized, without_adapters

if TYPE_CHECKING:
    from latentreward.alignment.policies.policy import Policy
    from latentreward.reward.scoring.stored import StoredReward

REWARD = "reward"
"""Name in peft of the first reward's adapter in the policy's network; further ones are ``reward1``, ``reward2``, …"""
PROBES = ("", "a cat, 5")
"""Prompts whose token ids are compared to tell whether two tokenizers are the same; too short to be cut."""


def shares_network(stored: StoredReward, policy: Policy) -> bool:
    """Tell whether the reward's network has the same frozen weights as the policy's, with at most an adapter added."""
    if not stored.shareable:
        return False
    outline = stored.on_meta_device
    if outline.with_network(policy.network, policy.text_encoder) is None:
        return False
    network = outline.get_submodule(outline.network_name)
    if public(network.config) != public(policy.network.config):
        return False
    adapted = any(".lora_" in name for name, _ in network.named_parameters())
    if adapted and not getattr(policy.network, "peft_config", None):  # a network without adapters gets none
        return False
    return same_frozen(stored, outline.network_name, network, policy.network, policy.source)


def shares_text(stored: StoredReward, policy: Policy) -> bool:
    """Tell whether the reward's tokenizers and text encoders are the same as the policy's."""
    theirs, ours = stored.on_meta_device.text_encoder if stored.shareable else None, policy.text_encoder
    if theirs is None or ours is None or type(theirs) is not type(ours) or theirs.num_tokens != ours.num_tokens:
        return False
    their_ids, our_ids = theirs.tokenize(PROBES), ours.tokenize(PROBES)
    if len(their_ids) != len(our_ids) or not all(map(torch.equal, their_ids, our_ids)):  # SD3 with and without T5
        return False
    return same_frozen(stored, "text_encoder", theirs, ours, policy.source, adapters=False)


def same_frozen(
    stored: StoredReward, part: str, theirs: nn.Module, ours: nn.Module, source: str, adapters: bool = True
) -> bool:
    """Tell whether a part of the reward, ``theirs`` on the meta device, was trained on the frozen weights of ``ours``.

    Samples of its frozen weights are recorded in the ``stored`` reward; it may have trained ``adapters``.
    """
    if any(p.requires_grad and not (adapters and ".lora_" in name) for name, p in theirs.named_parameters()):
        return False
    found, wanted = (dict(without_adapters(network.named_parameters())) for network in (ours, theirs))
    if any(name not in found or found[name].shape != weight.shape for name, weight in wanted.items()):
        return False
    if any(is_quantized(found[name]) for name in wanted):
        return False
    return stored.same_base(part, {name: found[name] for name in wanted}, source)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a diffusers config without private entries, such as the path from which it was loaded."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def share_adapter(policy: Policy, network: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Add the adapter of a reward, frozen, to the policy's network; return its name there, or None if there is none.

    The set of trainable parameters and the active adapter do not change. The new weights are left out of the policy's
    ``state_dict()``, and loading one does not miss them. The reward's ``network`` may be on the meta device, and
    ``weights`` are by their names in it.
    """
    from peft.tuners.lora import LoraLayer

    layers = [name for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        return None
    taken: Any = policy.network.peft_config
    adapter = next(name for name in (f"{REWARD}{number or ''}" for number in count()) if name not in taken)
    settings: Any = network.peft_config
    config = replace(settings["default"], target_modules=layers, lora_dropout=0.0)
    with torch.no_grad():
        for name, parameter in add_frozen_adapter(policy.network, config, adapter).items():
            trained = weights.get(name.replace(f".{adapter}.", ".default."))  # None if the head does not use the layer
            parameter.zero_() if trained is None else parameter.copy_(trained)
    policy.adapters.refresh()
    leave_out(policy.network, adapter)
    return adapter


def leave_out(network: nn.Module, adapter: str) -> None:
    """Keep an adapter out of the network's state dict, since its weights are loaded from the reward's files."""
    mark = f".{adapter}."

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and mark in name]:
            del state[name]

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if mark not in name]

    network.register_state_dict_post_hook(drop)
    network.register_load_state_dict_post_hook(forgive)
