"""Readers of reward model files (safetensors, ``torch.save``) that raise one-line errors."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from latentreward.core.errors import InputError, errors_at, first_line
from latentreward.core.storage.user_files import whole_file


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, absent_by_design: tuple[str, ...] = ()
) -> None:
    """Load ``state`` of the file ``path`` into ``module``, after checking that names and shapes match.

    Tensors named in ``absent_by_design`` may be missing and then keep their initial values.

    Raises:
        InputError: If a tensor is missing, unexpected or has the wrong shape; names the first one.
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


def not_dense(state: Mapping[str, Any], meta: bool = False) -> str | None:
    """Return the name of the first value that is not a dense tensor, or None.

    ``torch.load`` also reads sparse tensors, and tensors on the meta device, which have no values.

    Args:
        state: State dict.
        meta: Whether to accept tensors on the meta device.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or (value.is_meta and not meta):
            return name
    return None


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a state dict from a ``torch.save`` file with ``weights_only=True``, which runs no code of the file.

    Raises:
        InputError: If the file is damaged, holds anything but named tensors and plain values, or would take more memory
            than it has bytes: PyTorch unpacks compressed records, which ``torch.save`` does not write.
    """
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
    """Read tensors by name from a safetensors or ``torch.save`` file of ``model``, perhaps under ``state_dict``.

    Raises:
        InputError: If the file does not exist, is damaged, or holds more than tensors and so could run code.
    """
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
