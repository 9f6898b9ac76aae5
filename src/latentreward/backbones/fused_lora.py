"""LoRA layers of peft with fewer kernels: the product of the adapter is added to the layer's output in place."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class FusedLinear(lora.Linear):
    """A linear layer of peft that computes y + alpha / rank · B (A x) by one kernel after A x.

    peft takes three, a product, a scaling and a sum, which read and write an output of the layer's width six times;
    here it is read and written once. Under autocast peft also converts x to the type of A, only for autocast to
    convert it back. Results differ by rounding: fewer values between the operations are rounded.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output ``(..., out)`` for ``x`` ``(..., in)``; see :class:`peft.tuners.lora.Linear`."""
        names = () if self._disable_adapters else [name for name in self._active_adapter if name in self.lora_A]
        if args or kwargs or not names or x.ndim < 2 or not all(self._is_plain(name, x) for name in names):
            return super().forward(x, *args, **kwargs)
        # In two dimensions the output is no view, whose change in place would cost more kernels in a backward pass.
        rows = x.flatten(0, -2)
        output = self.base_layer(rows)
        for name in names:
            narrow = self.lora_A[name](self.lora_dropout[name](rows))
            # Autocast leaves operations in place alone.
            output.addmm_(narrow, self.lora_B[name].weight.to(output.dtype).t(), alpha=self.scaling[name])
        return output.unflatten(0, x.shape[:-1])

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Tell whether an adapter adds alpha / rank · B A x and nothing else, in types that need no conversion."""
        down, up = self.lora_A[name], self.lora_B[name]
        # A hook on the layer or on B sees an output that this class changes later, or does not compute.
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (self.base_layer, up))
        typed = torch.is_autocast_enabled(x.device.type) or x.dtype == down.weight.dtype == self.base_layer.weight.dtype
        return typed and not (hooked or self.merged or name in self.lora_variant or up.bias is not None)


def fuse_lora(module: nn.Module) -> None:
    """Let the LoRA layers in a module compute as :class:`FusedLinear`, in place; weights and their names stay.

    Layers of other kinds, such as on a quantised base, are left alone.
    """
    for part in module.modules():
        if type(part) is lora.Linear and type(part.base_layer) is nn.Linear:
            part.__class__ = FusedLinear
