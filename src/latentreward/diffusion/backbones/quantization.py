"""Storage of frozen linear layers in 8 or 4 bits, for large networks under adapters."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from math import ceil
from typing import Any, Literal

import torch
from torch import nn

from latentreward.core.checkpoints.base_weights import keep_sample, sample
from latentreward.core.errors import InputError

Quantization = Literal["int8", "bnb_int8", "nf4"]
LIBRARIES = {"int8": "torchao", "bnb_int8": "bitsandbytes", "nf4": "bitsandbytes"}
"""Kind of quantisation → library that stores the weights."""
PLANNED = "planned_quantization"
"""Attribute of a layer on the meta device: kind of quantisation that it would get."""


def check_quantization(kind: str | None, tuning: str) -> None:
    """Check a setting ``quantization`` before any weight is loaded.

    On the meta device, where costs are estimated, this machine needs neither a GPU nor the library.

    Raises:
        InputError: If the kind is unknown, its library or a GPU that it needs is missing, or the weights train.
    """
    if kind is None:
        return
    if kind not in LIBRARIES:
        raise InputError(f"quantization={kind!r} is unknown; choose from {', '.join(LIBRARIES)}")
    if tuning == "full":
        raise InputError(f"quantization={kind}: quantised weights cannot train; set tuning: lora or frozen")
    if torch.get_default_device().type == "meta":
        return
    if find_spec(LIBRARIES[kind]) is None:
        raise InputError(f"quantization={kind} needs {LIBRARIES[kind]}; pip install latentreward[quant]")
    if LIBRARIES[kind] == "bitsandbytes" and not torch.cuda.is_available():
        raise InputError(f"quantization={kind} (bitsandbytes) needs a GPU; use int8 (torchao) on a CPU")


def quantize(blocks: Iterable[nn.Module], kind: str) -> None:
    """Quantise the frozen linear layers of a network's blocks in place.

    Adapters, norms and the layers outside the blocks keep their types. On the meta device layers only get
    :data:`PLANNED`.
    """
    for block in blocks:
        layers = [(name, layer) for name, layer in block.named_modules() if is_frozen_linear(name, layer)]
        for name, layer in layers:
            if layer.weight.is_meta:
                setattr(layer, PLANNED, kind)
                continue
            values = sample(layer.weight.detach())
            if kind == "int8":
                from torchao.quantization import Int8WeightOnlyConfig, quantize_

                quantize_(layer, Int8WeightOnlyConfig())
            else:
                owner, _, last = name.rpartition(".")
                setattr(block.get_submodule(owner), last, _to_bitsandbytes(layer, kind))
            keep_sample(block.get_submodule(name), values)


def is_frozen_linear(name: str, layer: nn.Module) -> bool:
    """Tell whether a layer of a block is a frozen linear layer of the base."""
    return type(layer) is nn.Linear and "lora_" not in name and not layer.weight.requires_grad


def stored_bytes(layer: nn.Linear, kind: str) -> int:
    """Return the bytes that a layer's quantised weight takes, with its scales; code books are left out."""
    rows, numbers = layer.out_features, layer.weight.numel()
    if kind == "nf4":  # a scale of one byte for 64 numbers, and one of four bytes for 256 of these
        scales = ceil(numbers / 64)
        return ceil(numbers / 2) + scales + 4 * ceil(scales / 256)
    return numbers + (5 if kind == "int8" else 4) * rows  # a float32 scale for each row, in torchao with a zero point


def _to_bitsandbytes(layer: Any, kind: str) -> nn.Module:
    """Return the layer as one of bitsandbytes, which quantises its weights on the way to the GPU."""
    import bitsandbytes

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    new: Any
    if kind == "nf4":
        new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    module: nn.Module = new.requires_grad_(False)
    return module
