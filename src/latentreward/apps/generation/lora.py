"""Loading of a LoRA file into a policy."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentreward.alignment import POLICY, AdapterSwitch, Policy
from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.storage.json_files import parse, read_config
from latentreward.core.storage.user_files import find_files
from latentreward.diffusion.backbones.tuning import CONFIG, PREFIX, check_settings, plain_name, stored_ranks
from latentreward.reward.scoring.files import read_state_dict

LOADED = "lora"
"""Name in peft of an adapter loaded from a file."""
WEIGHTS = (".safetensors", ".bin")
REWARD_HEAD = "head.safetensors"
"""File by which the folder of a published reward model is recognised."""
OTHER_KIND = re.compile(r"\b(hada|lokr|oft|boft|ia3|vera|glora)_")  # in names of tensors of LoHa, LoKr, OFT and such
MOST_TENSORS = 20_000  # FLUX.1 and Qwen-Image have some 2,000
SCALES = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora")
"""Settings of peft that are read. The tensors tell all others, and some of those make peft run code."""


def check_lora(path: Path) -> None:
    """Check that ``path`` may hold a LoRA, before the policy is loaded."""
    remedy = "give a .safetensors file, or the folder of one as latentreward export writes it"
    if not path.exists():
        raise InputError(f"lora: {path} does not exist; {remedy}")
    if path.suffix == ".ckpt":
        raise InputError(f"lora: {path} is the checkpoint of a run; give it as checkpoint, or {remedy}")
    if path.is_dir() and (path / REWARD_HEAD).is_file():
        raise InputError(f"lora: {path} is a reward model, no LoRA of a generator; {remedy}")
    if path.is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()):
        raise InputError(f"lora: {path} holds no {' or '.join(WEIGHTS)} file; {remedy}")


def load_lora(policy: Policy, path: Path) -> None:
    """Load a LoRA into ``policy`` and activate it, in place of the trainable adapter, without dropout.

    Args:
        policy: Policy as returned by :meth:`PolicySource.load <latentreward.alignment.PolicySource.load>`.
        path: ``.safetensors`` file, or a folder with one. The names of the weights may follow any convention that
            diffusers reads, for SD3 only diffusers' own; or those of peft, beside an ``adapter_config.json``.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_lora(path)
    network = policy.network
    unfit = (ValueError, LookupError, AttributeError, RuntimeError, OSError, TypeError, ImportError, SafetensorError)
    try:
        tensors, settings = read_tensors(path, policy.family.part)
        weights = weights_by_layer(tensors, policy, path, "lora_alpha" in settings)
        if broken := next((name for name, tensor in weights.items() if not tensor.float().isfinite().all()), None):
            raise InputError(f"lora: {path}: {broken} or its alpha is not finite; give a LoRA of a sound training")
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        ranks = stored_ranks(network, shapes, f"lora: {path}")
        settings = {name: settings[name] for name in SCALES if settings.get(name) is not None}
        check_settings(settings, ranks.values(), f"lora: {path}")
        rank = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{re.escape(layer)}": own for layer, own in ranks.items() if own != rank}
        if "lora_alpha" not in settings:
            settings |= {"lora_alpha": rank, "alpha_pattern": others}
        options = {"lora_bias": ".lora_B.bias", "use_dora": ".lora_magnitude_vector.weight"}
        settings |= {name: any(key.endswith(end) for key in weights) for name, end in options.items()}
        config = LoraConfig(**settings | {"r": rank, "rank_pattern": others, "target_modules": [*ranks]})
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(POLICY)
        getattr(network, "peft_config", {}).pop(POLICY, None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, network, LOADED, state_dict=weights)
        own = {plain_name(name): weight for name, weight in network.named_parameters() if f".{LOADED}." in name}
        if odd := [name for name in own | weights if getattr(own.get(name), "shape", 0) != shapes.get(name)]:
            raise InputError(f"lora: {path} does not fit {policy.source} in {', '.join(odd)[:200]}; give one of it")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])
    except unfit as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"lora: {path} is no LoRA for {policy.source} ({first_line(error)})") from error
    policy.adapters = AdapterSwitch(network, LOADED)


def read_tensors(path: Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a LoRA file by name, and the settings of peft that it or its folder holds for ``part``."""
    files = [path] if path.is_file() else find_files(path, "*.safetensors") or find_files(path, "*.bin")
    usual = [file for file in files if file.stem == "pytorch_lora_weights"]
    file = files[0] if len(files) == 1 else (usual or [path / "pytorch_lora_weights.safetensors"])[0]
    if file.suffix != ".safetensors":
        return read_state_dict(file, "a LoRA"), {}
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        with errors_at(f"lora: {path}: lora_adapter_metadata: "):
            metadata = parse((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if (file.parent / CONFIG).is_file() and all(name.startswith(PREFIX) for name in tensors):
        tensors = {f"{part}.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
        return tensors, read_config(file.parent / CONFIG)
    return tensors, {name.removeprefix(f"{part}."): v for name, v in metadata.items() if name.startswith(f"{part}.")}


def weights_by_layer(tensors: Mapping[str, Tensor], policy: Policy, path: Path, scaled: bool) -> dict[str, Tensor]:
    """Return A and B of each layer by the names ``LAYER.lora_A.weight``.

    Unless the file's settings tell alpha (``scaled``), B is multiplied by alpha / rank where a tensor tells alpha.
    """
    from diffusers import loaders  # importing the pipeline classes would load image processors and print warnings
    from diffusers.utils import convert_unet_state_dict_to_peft

    if len(tensors) > MOST_TENSORS:
        raise InputError(f"lora: {path} holds {len(tensors)} tensors, more than {MOST_TENSORS}; give a LoRA")
    family, config = policy.family, getattr(policy.network, "config", None)
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"lora: {path} holds several adapters; give a file of one")
    if other := next(filter(OTHER_KIND.search, plain), None):
        kind = OTHER_KIND.search(other)[0]  # type: ignore[index]
        raise InputError(
            f"lora: {path} is an adapter of another kind, by its tensors {kind} ({other:.100}); give a LoRA"
        )
    if empty := next((name for name, tensor in plain.items() if not tensor.numel()), None):
        raise InputError(f"lora: {path}: {empty} is empty, of rank 0; give a LoRA of rank 1 or more")
    loader = getattr(loaders, family.lora_loader) if family.lora_loader else None
    sources = {
        name: tensor.detach().requires_grad_()
        for name, tensor in plain.items()
        if tensor.is_floating_point() and not name.endswith(".alpha")
    }
    alphas: dict[str, Any] = {}
    # A tensor that diffusers dropped has no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        weights = plain | {name: tensor.clone() for name, tensor in sources.items()}
        if loader is not None:
            # FLUX.1's loader drops alphas unless asked; others return them always, or leave them among the weights.
            options = {"return_alphas": True, "return_lora_metadata": True, "unet_config": config}
            try:
                weights, *rest = loader.lora_state_dict(weights, **options)
            except (KeyError, ValueError) as error:
                reason = " ".join(str(error).split())  # of several lines, the names of tensors in the last
                raise InputError(f"lora: {path} cannot be converted: {reason:.200}; get the file again") from error
            alphas = rest[0] or {} if len(rest) == 2 else {}
        outputs = [tensor for tensor in weights.values() if tensor.requires_grad]
        zeros = [torch.zeros_like(tensor) for tensor in outputs]
        used = torch.autograd.grad(outputs, [*sources.values()], zeros, allow_unused=True) if outputs else ()
    if lost := [name for name, gradient in zip(sources, used, strict=False) if gradient is None]:
        raise InputError(f"lora: {path}: {len(lost)} of its tensors cannot be used: {', '.join(lost)[:200]}")
    if others := sorted({name.split(".")[0] for name in weights} - {family.part}):
        raise InputError(
            f"lora: {path} holds weights of {others[0]:.100}, not of {family.part}, by their names; give a LoRA of the "
            f"{family.part} alone, with diffusers' names or in peft's folder, or merge it into a pipeline"
        )
    alphas |= {name: weights.pop(name) for name in [*weights] if name.endswith(".alpha")}
    if plain.keys() != tensors.keys() and not alphas and not scaled:
        raise InputError(
            f"lora: {path} has names as in memory, such as {min(tensors.keys() - plain.keys()):.100}, and tells no "
            "alpha; save it by diffusers' save_lora_weights with the adapter's metadata"
        )
    start = f"{family.part}."
    weights = {name.removeprefix(start): w.detach() for name, w in convert_unet_state_dict_to_peft(weights).items()}
    alphas = {name.removeprefix(start).removesuffix(".alpha"): float(alpha) for name, alpha in alphas.items()}
    for name, alpha in convert_unet_state_dict_to_peft({} if scaled else alphas).items():
        layer = name.rpartition(".lora_")[0] or name
        scale = alpha / len(weights[f"{layer}.lora_A.weight"])
        weights[f"{layer}.lora_B.weight"] = weights[f"{layer}.lora_B.weight"] * scale
    return weights
