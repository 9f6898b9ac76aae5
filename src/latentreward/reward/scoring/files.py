"""Files of a reward model: weights (safetensors, ``torch.save``), LoRA adapters in PEFT's format, configs of a run."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from latentreward.core.errors import InputError, errors_at, first_line, one_line
from latentreward.core.storage.json_files import read_config
from latentreward.core.storage.user_files import whole_file
from latentreward.core.storage.weight_files import read_header
from latentreward.diffusion.backbones.tuning import CONFIG, PEFT_SETTINGS, PREFIX, WEIGHTS, check_settings, stored_ranks
from latentreward.reward.heads.clip_projection import MultiScale

PUBLISHED_RMS_EPS = 2.0**-7  # epsilon of the RMS norms with which DiNa-LRM's published weights were trained


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of a published checkpoint that its files do not hold.

    Attributes:
        guidance: LRM: guidance g of visual feature enhancement, the authors' ``guidance_scale``; at 1 or below visual
            feature enhancement is off.
        multi_scale: LRM: see :class:`~latentreward.reward.CLIPProjectionHead`. The authors' ``multi_scale: False`` is
            ``single``, their ``multi_scale_cfg: True`` is ``enhanced``. None takes ``single`` if the width of the
            stored projection is that of the mid block alone, and ``plain`` otherwise.
        rms_eps: DiNa-LRM: epsilon of the head's RMS norms. The published weights were trained with 2⁻⁷; the authors'
            code computes with 1.19e-7 under newer PyTorch.
        t5_length: DiNa-LRM: number of T5 tokens per prompt; 256 in the published example, 128 in training.
    """

    guidance: float = 7.5
    multi_scale: MultiScale | None = None
    rms_eps: float = PUBLISHED_RMS_EPS
    t5_length: int = 256


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, absent_by_design: tuple[str, ...] = ()
) -> None:
    """Load ``state`` of the file ``path`` into ``module``, after checking that names and shapes match.

    Tensors named in ``absent_by_design`` may be missing and then keep their initial values.
    """
    own = module.state_dict().items()
    expected = {name: tensor for name, tensor in own if name not in absent_by_design or name in state}
    compare_tensors(expected, state, path)
    module.load_state_dict(state, strict=False)


def compare_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if names, shapes or kinds of the tensors found in ``path`` differ from the expected ones."""
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise InputError(f"cannot load {path}: {kind} tensor {sorted(map(str, names))[0]} ({len(names)} in all)")
    if name := not_dense(found):
        raise InputError(f"cannot load {path}: {name} is not a dense tensor; download it again")
    for name, tensor in expected.items():
        shape, wanted = tuple(found[name].shape), tuple(tensor.shape)
        if shape != wanted:
            raise InputError(f"cannot load {path}: tensor {name} has shape {shape}, expected {wanted}")
        if tensor.is_floating_point() and not found[name].is_floating_point():
            raise InputError(f"cannot load {path}: tensor {name} is {found[name].dtype}, expected floating point")


def not_dense(state: Mapping[str, Any]) -> str | None:
    """Return the name of the first value that is not a dense tensor, or None.

    ``torch.load`` also reads sparse tensors, and tensors on the meta device, which have no values.
    """
    dense = {
        name: isinstance(one, Tensor) and one.layout == torch.strided and not one.is_meta for name, one in state.items()
    }
    return next((name for name, sound in dense.items() if not sound), None)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a state dict from a ``torch.save`` file with ``weights_only=True``, which runs no code of the file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:
                size = sum(record.file_size for record in records.infolist())
            if size > path.stat().st_size:
                raise ValueError(f"its records unpack to {size} bytes")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises errors of many types on damaged files
        raise InputError(
            f"cannot load {path}: it is damaged, or holds more than tensors and could run code ({first_line(error)}); "
            "download it again"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"cannot load {path}: it holds a {type(state).__name__}, not named tensors; download it again")
    return dict(state)


def read_state_dict(path: Path, model: str) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors or ``torch.save`` file of ``model``, perhaps under ``state_dict``."""
    if not path.is_file():
        raise InputError(f"weights: no file {path}; give that of {model}")
    with errors_at("weights: "):
        loaded = read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    tensors = loaded.get("state_dict", loaded)
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise InputError(f"weights: {path} holds no named tensors; give the state dict of {model}")
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}


def existing_folder(folder: str | Path, *files: str) -> Path:
    """Return ``folder`` as a path; raise InputError if it or one of ``files`` is missing, or a git-lfs pointer."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model folder {str(folder)!r} does not exist; download the model and give its folder")
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"model folder {str(folder)!r} lacks {name}; download it again")
        whole_file(folder / name)
    return folder


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto the CPU; raise InputError if the file is missing or damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"cannot load {path}: {first_line(error)}; download it again") from error


ADAPTER = "default"  # name of the adapter in the network's LoRA layers


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers of ``network`` that have the adapter :data:`ADAPTER`, by name."""
    from peft.tuners.lora import LoraLayer

    modules = network.named_modules()
    return {name: one for name, one in modules if isinstance(one, LoraLayer) and ADAPTER in one.lora_A}


def names_in_file(network: nn.Module) -> dict[str, str]:
    """Return, for every tensor of the adapter, its name in PEFT's file → its name in ``network``."""
    names = (name for name, _ in network.named_parameters() if ".lora_" in name and f".{ADAPTER}." in name)
    return {PREFIX + name.replace(f".{ADAPTER}.", "."): name for name in names}


def write_adapter(network: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of ``network`` in the format that PEFT's ``from_pretrained`` reads."""
    folder.mkdir(parents=True)
    own = {name: network.get_parameter(full) for name, full in names_in_file(network).items()}
    state = {name: weight.detach().cpu().contiguous() for name, weight in own.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    layers = lora_layers(network)
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    settings = {  # only few entries, so that any version of PEFT reads the file
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout[ADAPTER], "p", 0.0),
        "r": rank,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": list(layers),
        "use_rslora": bool(first.use_rslora.get(ADAPTER, False)),
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def inject_adapter(network: nn.Module, folder: Path) -> None:
    """Add the LoRA layers that the config in ``folder`` describes to ``network``, in float32 with initial values.

    The new tensors are trainable; all other parameters of the network are frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    path = existing_folder(folder, CONFIG, WEIGHTS) / CONFIG
    settings = read_config(path)
    known = {name: settings[name] for name in PEFT_SETTINGS if settings.get(name) is not None}
    try:
        header = read_header(folder / WEIGHTS)[0].items()
        shapes = {name.removeprefix(PREFIX): entry.shape for name, entry in header}
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot load {folder / WEIGHTS}: {error}; download it again") from error
    ranks = stored_ranks(network, shapes, None)  # read_lora names those that do not fit
    check_settings(known, ranks.values(), f"cannot load {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(LoraConfig(**known), network, ADAPTER)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, re.error) as error:
        raise InputError(f"cannot load {path}: {one_line(error)}; is this the adapter of that network?") from error
    for name in names_in_file(network).values():
        weight = network.get_parameter(name)
        weight.data = weight.data.float()


def read_lora(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of the adapter in ``folder``, by their names in ``network``."""
    path = existing_folder(folder, WEIGHTS) / WEIGHTS
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_safetensors(path).items()}
    own = {name.removeprefix(PREFIX): full for name, full in names_in_file(network).items()}
    compare_tensors({name: network.get_parameter(full) for name, full in own.items()}, state, path)
    return {own[name]: tensor for name, tensor in state.items()}


def fill_adapter(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of an adapter, by their names in ``network``, into its LoRA layers."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            network.get_parameter(name).copy_(tensor)


def configs_beside(checkpoint: Path) -> list[Path]:
    """Return the ``config*.yaml`` in the folder of ``checkpoint``, oldest first, or else those one folder up."""
    folders = checkpoint.absolute().parents[:2]
    found = next(filter(None, ([*folder.glob("config*.yaml")] for folder in folders)), [])
    return sorted(found, key=lambda path: path.stat().st_mtime)


def settings_beside(checkpoint: Path) -> Path | None:
    """Return the ``config*.yaml`` of the run that wrote ``checkpoint``, from :func:`configs_beside`, or None.

    If several runs wrote into one folder, the last file that is not newer than the checkpoint is returned.
    """
    found = configs_beside(checkpoint)
    earlier = [path for path in found if path.stat().st_mtime <= checkpoint.stat().st_mtime]
    return next(iter([*earlier[-1:], *found]), None)
