"""Compiled blocks: one function for all blocks of one structure, for every adapter, gradient mode and batch size."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.core.errors import first_line

GRAPHS = 16
"""Most graphs of blocks of one structure; beyond, PyTorch computes without. Its own limit of 8 is reached with a batch
of one, two image sizes and two prompt lengths, with and without gradient."""
Backend = str | Callable[..., Any]


class CompiledBlock:
    """Mark of a block's class whose ``forward`` is compiled."""


def compile_blocks(blocks: Iterable[nn.Module], backend: Backend = "inductor") -> None:
    """Let each block compute with ``torch.compile`` from its next call on, in place; hooks and weights stay.

    Blocks of one structure share their graphs: one with gradient and one without, for each set of adapters at work, for
    every batch of two rows or more; a second image size or prompt length makes them general once more. A block that
    PyTorch cannot compile is computed as before, and a warning says so.
    """
    for block in blocks:
        if not isinstance(block, CompiledBlock):
            block.__class__ = compiled_class(type(block), backend)


def uncompile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let blocks compute without ``torch.compile`` again; those that FSDP2 has sharded since stay compiled."""
    for block in blocks:
        if CompiledBlock in type(block).__bases__:
            block.__class__ = type(block).__bases__[1]


@cache
def compiled_class(kind: type[nn.Module], backend: Backend) -> type[nn.Module]:
    """Return the subclass of ``kind`` that compiles its ``forward`` once for each structure of its instances."""
    functions: dict[Hashable, Callable[..., Any]] = {}

    @wraps(kind.forward)
    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (key := vars(block).get("_structure")) is None:
            key = vars(block)["_structure"] = structure(block)
        if key not in functions:
            functions[key] = compiled(kind.forward, backend)
        args, kwargs = of_any_length(args), of_any_length(kwargs)
        try:
            # Backward passes too are compiled in the first forward pass: an error in one would end the run.
            eager_backward = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
            with eager_backward, torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return functions[key](block, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            functions[key] = kind.forward
            warnings.warn(
                f"performance.compile_blocks: PyTorch cannot compile {kind.__name__}, which is computed without from "
                f"now on: {first_line(getattr(error, 'inner_exception', error))}",
                stacklevel=2,
            )
            return kind.forward(block, *args, **kwargs)

    # A subclass, not an attribute of the block: it survives deepcopy, and FSDP2 derives a class of its own from it.
    return type(kind.__name__, (CompiledBlock, kind), {"forward": forward, "__module__": kind.__module__})


def compiled(forward: Any, backend: Backend) -> Callable[..., Any]:
    """Compile a copy of a method: PyTorch keeps at most 8 graphs of a code object, which unlike blocks would share."""
    code = forward.__code__.replace()
    copied = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return torch.compile(copied, backend=backend)


def of_any_length(arguments: Any) -> Any:
    """Mark the first axis of each tensor as of any length: else each of two batch sizes would have its own graph."""
    if isinstance(arguments, Tensor):
        # PyTorch makes other graphs for a view, such as the first block's input, than for the output of a block.
        alone = arguments.clone() if arguments._is_view() else arguments
        if alone.ndim > 1 and len(alone) > 1:
            torch._dynamo.maybe_mark_dynamic(alone, 0)
        return alone
    if isinstance(arguments, dict):
        return {name: of_any_length(value) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        values = [of_any_length(value) for value in arguments]
        return type(arguments)(*values) if hasattr(arguments, "_fields") else type(arguments)(values)
    return arguments


def structure(block: nn.Module) -> Hashable:
    """Return what blocks must have in common to share graphs: classes of parts, shapes, types and trained weights."""
    parts = tuple((name, type(part)) for name, part in block.named_modules())
    weights = block.named_parameters()
    return parts, tuple((name, weight.shape, weight.dtype, weight.requires_grad) for name, weight in weights)
