"""Files of reward models: read whole or refused in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from latentreward.errors import InputError, first_line

POINTER = b"version https://git-lfs"
"""How a file begins that git-lfs left in place of a large one."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: If it is none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is damaged (it holds a {type(config).__name__}); download it again")
    return config


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, absent_by_design: tuple[str, ...] = ()
) -> None:
    """Fill ``module`` from ``state``; both must hold the same tensors.

    Args:
        module: What is filled.
        state: Name → tensor.
        path: File they came from, for the message.
        absent_by_design: Names of ``module`` that the layout never holds; they keep their initial values.

    Raises:
        InputError: Naming the first tensor that is missing, left over or of another shape.
    """
    own = module.state_dict().items()
    compare_tensors(
        {name: tensor for name, tensor in own if name not in absent_by_design or name in state}, state, path
    )
    module.load_state_dict(state, strict=False)


def compare_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError naming the first tensor whose name or shape in a file is not as expected."""
    for kind, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise InputError(f"cannot load {path}: {kind} tensor {sorted(names)[0]} ({len(names)} in all)")
    for name, tensor in expected.items():
        shape, wanted = tuple(found[name].shape), tuple(tensor.shape)
        if shape != wanted:
            raise InputError(f"cannot load {path}: tensor {name} has shape {shape}, expected {wanted}")


def read_tensors(path: Path) -> dict[str, Any]:
    """A state dict from a ``torch.save`` file, tensors and plain values only.

    Raises:
        InputError: If the file is no such file or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on garbage the unpickler raises nearly anything
        raise InputError(f"cannot load {path}: {first_line(error)}; download it again") from error
    if not isinstance(state, Mapping):
        raise InputError(f"cannot load {path}: it holds a {type(state).__name__}, not named tensors; download it again")
    return dict(state)


def existing_folder(folder: str | Path, *files: str) -> Path:
    """``folder`` as a path, if it holds ``files``.

    Raises:
        InputError: Naming what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model folder {str(folder)!r} does not exist; download the model and give its folder")
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"model folder {str(folder)!r} lacks {name}; download it again")
        with (folder / name).open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                place = f"{folder / name} is a git-lfs pointer, not the file"
                raise InputError(f"{place}; run `git lfs pull` there, or download it again")
    return folder


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        InputError: If the file is damaged.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"cannot load {path}: {first_line(error)}; download it again") from error
