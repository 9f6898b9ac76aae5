"""Loading of a trained policy from the checkpoint of an alignment run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.alignment.policies.loading import PolicySource
from latentreward.alignment.policies.policy import POLICY, Policy
from latentreward.core.checkpoints.base_weights import BaseSample
from latentreward.core.checkpoints.shards import read_checkpoint
from latentreward.core.errors import InputError, first_line
from latentreward.diffusion import LoRA, is_foreign
from latentreward.diffusion.backbones.tuning import check_settings, plain_name, stored_ranks
from latentreward.reward.scoring.recipe import ONLY_IN_TRAINING

SOURCE = "policy_source"  # key of a checkpoint that holds the fields of a :class:`PolicySource` as plain values
ADAPTER = f".{POLICY}."  # part of a parameter's name that marks a weight of the trained adapter
PREFIX = "policy."  # of the policy's weights in a checkpoint's ``state_dict``


@dataclass(frozen=True)
class SavedAdapter:
    """The trained adapter of an alignment run."""

    weights: dict[str, Tensor]  # by their parameter names in a :class:`Policy`
    source: PolicySource  # of the base network, with the settings of the adapter
    base: dict[str, Any] | None  # sample of the base's weights, by which another base is recognised


def read_policy_adapter(checkpoint: Path | str, trusted: bool = False) -> SavedAdapter:
    """Read the adapter from the checkpoint, one file or a folder of shards, of any alignment module.

    If it is ``trusted``, it may name a family outside this package, whose module is imported.
    """
    content = read_checkpoint(Path(checkpoint))
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items() if ADAPTER in name}
    if not weights or SOURCE not in content:
        raise InputError(f"checkpoint: {checkpoint} holds no policy; give the checkpoint of an alignment run")
    try:
        record = {name: value for name, value in content[SOURCE].items() if name not in ONLY_IN_TRAINING}
        source = PolicySource(**record, lora=LoRA(**content[SOURCE]["lora"]))
        names = [*(source.lora.target_modules or ())]
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"checkpoint: {checkpoint}: {SOURCE} is of another version ({first_line(error)})") from error
    ranks = [len(tensor) if tensor.ndim else 0 for name, tensor in weights.items() if ".lora_A." in name]
    settings = {"r": source.lora.rank, "lora_alpha": source.lora.alpha, "target_modules": names}
    check_settings(settings, ranks, f"checkpoint: {checkpoint}: {SOURCE}.lora")
    # A family is code: loading a stranger's checkpoint must not import what it names.
    if not isinstance(source.family, str | None) or (not trusted and is_foreign(source.family)):
        raise InputError(
            f"checkpoint: {checkpoint} names the family {source.family!r:.80}, which would be imported; if you trust "
            "it, give it yourself with its pipeline (generate: policy.source and policy.family; evaluate-policy: "
            "policy.pipeline.source and policy.pipeline.family), or export --trust_remote_code=true"
        )
    return SavedAdapter(weights, source, content.get("base"))


def network_name(name: str) -> str:
    """Convert the name of an adapter's weight in a :class:`Policy` to its name in the network, without peft's part."""
    return plain_name(name.removeprefix("network."))


def load_policy(checkpoint: Path | str, source: PolicySource | None = None) -> Policy:
    """Load the policy of an alignment run with its trained adapter, on the CPU in evaluation mode.

    Args:
        checkpoint: Lightning checkpoint of any alignment module: one file or a folder of shards, with all weights or
            the trainable ones only. To load the moving average of ``TrainableEMA``, first write a checkpoint with
            ``latentreward consolidate --average=true``.
        source: Source of the base, and shape of the adapter; by default those recorded in the checkpoint.
    """
    saved = read_policy_adapter(checkpoint, trusted=source is not None)
    shapes = {network_name(name): tuple(tensor.shape) for name, tensor in saved.weights.items()}
    source = source or saved.source
    with torch.device("meta"):  # before layers of a stranger's ranks take memory
        network = source.resolve_family().load_network(pretrained=False)
    stored_ranks(network, shapes, f"checkpoint: {checkpoint}, trained on {saved.source.source},")
    policy = source.load()
    fill_adapter(policy, saved, checkpoint)
    return policy.eval()


def fill_adapter(policy: Policy, saved: SavedAdapter, checkpoint: Path | str) -> None:
    """Give ``policy``, which has an adapter of the same shape on the same base, the adapter of an alignment run."""
    if saved.base is not None:
        BaseSample.of(policy, policy.source).check(saved.base)
    weights, own = saved.weights, {name: one for name, one in policy.named_parameters() if ADAPTER in name}
    odd = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if odd:
        told = f"{checkpoint}: {odd[0]} does not fit the policy {policy.source} ({len(odd)} such weights)"
        raise InputError(f"{told}; give the source and lora (rank, target_modules) of its training")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
