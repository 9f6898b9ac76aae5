"""A device without float64, as Apple's, on machines that have none: its tensors have their values on the CPU."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

NARROW = torch.device("mps")


class NarrowTensor(Tensor):
    """Tensor of the device; raises TypeError for float64."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        made: Self = Tensor._make_subclass(cls, held)
        made.held = held
        return made


class NarrowDevice(TorchFunctionMode):
    """Context in which tensors can be computed with on the device, and moved there and back."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, owner = kwargs or {}, args[0] if args else None
        if function == Tensor.device.__get__ and isinstance(owner, NarrowTensor):  # type: ignore[attr-defined]
            return NARROW
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        here = any(isinstance(one, NarrowTensor) for one in tensors)
        places = [one for one in args[1:2] if function is Tensor.to and isinstance(one, str | torch.device)]
        target = next(map(torch.device, places), kwargs.get("device"))
        if target is not None or function is Tensor.cpu:
            here = target == NARROW
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            args = tuple("cpu" if one == NARROW else one for one in args) if function is Tensor.to else args
        elif here and any(not isinstance(one, NarrowTensor) and one.ndim for one in tensors):
            raise RuntimeError(f"{function} has tensors of two devices")
        args, kwargs = tree_map(lambda one: one.held if isinstance(one, NarrowTensor) else one, (args, kwargs))
        found = function(*args, **kwargs)
        return tree_map(lambda one: NarrowTensor(one) if here and isinstance(one, Tensor) else one, found)
