"""Loading of a LoRA file into a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentreward.backbones.tuning import PEFT_SETTINGS
from latentreward.errors import InputError, first_line
from latentreward.policies import POLICY, AdapterSwitch, Policy

LOADED = "lora"
"""Name in peft of an adapter loaded from a file."""
WEIGHTS = (".safetensors", ".bin")
REWARD_HEAD = "head.safetensors"
"""File by which the folder of a published reward model is recognised."""


def check_lora(path: Path) -> None:
    """Check that ``path`` may hold a LoRA, before the policy is loaded.

    Raises:
        InputError: If ``path`` does not exist, is the folder of a reward model, or is a folder without weight files.
    """
    remedy = "give a .safetensors file, or the folder of one as latentreward export writes it"
    if not path.exists():
        raise InputError(f"lora: {path} does not exist; {remedy}")
    if path.is_dir() and (path / REWARD_HEAD).is_file():
        raise InputError(f"lora: {path} is a reward model, no LoRA of a generator; {remedy}")
    if path.is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()):
        raise InputError(f"lora: {path} holds no {' or '.join(WEIGHTS)} file; {remedy}")


def load_lora(policy: Policy, path: Path) -> None:
    """Load a LoRA into ``policy`` and activate it, in place of the trainable adapter.

    Args:
        policy: Policy as returned by :meth:`PolicySource.load <latentreward.policies.PolicySource.load>`.
        path: ``.safetensors`` file, or a folder with one. The names of the weights may follow any convention that
            diffusers reads; for SD3 only diffusers' own.

    Raises:
        InputError: If there is no LoRA at ``path``, the LoRA belongs to another network, or it changes text encoders.
    """
    from diffusers import loaders  # importing the pipeline classes would load image processors and print warnings

    check_lora(path)
    network: Any = policy.network
    loader, part = getattr(loaders, policy.family.lora_loader), policy.family.part
    try:
        # Name the only file of a folder: offline, diffusers before 0.40 demands a weight_name.
        file = files[0] if len(files := [*path.glob("*.safetensors")]) == 1 else path
        known = {"weight_name": file.name if file.is_file() else None, "unet_config": network.config}
        weights, *rest = loader.lora_state_dict(str(file), return_lora_metadata=True, **known)
        alphas, metadata = rest if len(rest) == 2 else (None, *rest)
        if others := sorted({name.split(".")[0] for name in weights} - {part}):
            raise InputError(
                f"lora: {path} holds {others[0]}, which is no weight of the {part}; give a LoRA of the {part} alone, "
                "in diffusers' naming, or merge it into a pipeline"
            )
        # Drop other fields of the metadata: some of them make peft import modules.
        metadata = {name: value for name, value in (metadata or {}).items() if name.split(".")[-1] in PEFT_SETTINGS}
        network.delete_adapters(POLICY)
        network.load_lora_adapter(weights, part, adapter_name=LOADED, network_alphas=alphas, metadata=metadata or None)
    except InputError:
        raise
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, ImportError) as error:
        raise InputError(f"lora: {path} is no LoRA for {policy.source} ({first_line(error)})") from error
    if LOADED not in getattr(network, "peft_config", {}):
        raise InputError(f"lora: {path} holds no weight of a LoRA for the {part} of {policy.source}")
    policy.adapters = AdapterSwitch(network, LOADED)
