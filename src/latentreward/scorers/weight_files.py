"""Reading of weight files in the formats in which scorers are published."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentreward.errors import InputError, first_line


def read_state_dict(path: Path, model: str) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a file of ``torch.save``.

    A file of ``torch.save`` may hold the tensors directly or under the key ``state_dict``. Error messages name
    ``model``, which the file should hold.

    Raises:
        InputError: If the file does not exist, is damaged, or holds more than tensors and so could run code.
    """
    if not path.is_file():
        raise InputError(f"weights: no file {path}; give that of {model}")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise InputError(
            f"weights: {path} is damaged, or holds more than tensors and could run code ({first_line(error)}); get it "
            "again"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"weights: {path} holds no named tensors; give the state dict of {model}")
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}
