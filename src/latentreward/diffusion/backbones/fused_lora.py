"""LoRA layers of peft with fewer kernels: the product of the adapter is added to the layer's output in place."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class AddScaledProduct(torch.autograd.Function):
    """Add ``scaling`` · h Bᵀ to ``output`` in place, for h ``(n, rank)`` and B ``(out, rank)``.

    Autograd of ``addmm_`` would take two kernels more.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, narrow: Tensor, up: Tensor, scaling: float) -> Tensor:
        """Return ``output`` ``(n, out)``, changed."""
        _, narrow_needed, up_needed, _ = ctx.needs_input_grad
        ctx.mark_dirty(output)
        ctx.save_for_backward(narrow if up_needed else None, up if narrow_needed else None)
        ctx.scaling = scaling
        return output.addmm_(narrow, up.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of ``output``, h and B."""
        narrow, up = ctx.saved_tensors
        nothing = grad.new_empty(())  # beta 0 leaves it unread
        of_narrow = None if up is None else torch.addmm(nothing, grad, up, beta=0, alpha=ctx.scaling)
        of_up = None if narrow is None else torch.addmm(nothing, grad.t(), narrow, beta=0, alpha=ctx.scaling)
        return grad, of_narrow, of_up, None


class FusedLinear(lora.Linear):
    """A linear layer of peft that computes y + alpha / rank · B (A x) by one kernel after A x.

    peft takes three, a product, a scaling and a sum, which read and write an output of the layer's width six times;
    here it is read and written once. Results differ by rounding: fewer values between the operations are rounded.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output ``(..., out)`` for ``x`` ``(..., in)``; see :class:`peft.tuners.lora.Linear`."""
        names = () if self._disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not names or x.ndim < 2 or not all(self._is_plain(name, x) for name in names):
            return super().forward(x, *args, **kwargs)
        # In two dimensions the output is no view, whose change in place would cost more kernels in a backward pass.
        rows = x.flatten(0, -2)
        output = self.base_layer(rows)
        for name in names:
            narrow = self.lora_A[name](self.lora_dropout[name](rows))
            up = self.lora_B[name].weight.to(output.dtype)  # autocast does not convert for operations in place
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph would break at the function
                output = AddScaledProduct.apply(output, narrow, up, self.scaling[name])
            else:
                output.addmm_(narrow, up.t(), alpha=self.scaling[name])
        # As torch's own linear: no view, so that the result may be changed in place like that of any layer.
        return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], output.shape[-1]))

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Tell whether an adapter adds alpha / rank · B A x and nothing else, in types that fit together."""
        base, up = self.base_layer, self.lora_B[name]
        if self.merged or name in self.lora_variant or up.bias is not None or not isinstance(self.scaling[name], float):
            return False
        if base._backward_hooks or base._backward_pre_hooks:  # they make the output a view that must not change
            return False
        if type(up.weight) is not nn.Parameter or up.weight.device != x.device:  # a DTensor, or offloaded by accelerate
            return False
        types = {x.dtype, base.weight.dtype, self.lora_A[name].weight.dtype, up.weight.dtype}
        return len(types) == 1 or (torch.float64 not in types and torch.is_autocast_enabled(x.device.type))


def fuse_lora(module: nn.Module) -> int:
    """Let the LoRA layers in a module compute as :class:`FusedLinear`, in place; return their number.

    Layers of other kinds, on a quantised base, or with hooks by now are left alone: a hook on the base would see an
    output that changes later, one on B would not be called. Hooks are not looked at later: a checkpointed block that is
    computed again must take the same way.
    """
    fused = 0
    for part in module.modules():
        if type(part) is lora.Linear:
            inner = (part.base_layer, *part.lora_B.values())
            plain = all(type(layer) is nn.Linear for layer in inner) and type(part.base_layer.weight) is nn.Parameter
            if plain and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in inner):
                part.__class__ = FusedLinear
                fused += 1
    return fused


def unfuse_lora(module: nn.Module) -> None:
    """Let the layers that :func:`fuse_lora` changed compute as peft's again."""
    for part in module.modules():
        if type(part) is FusedLinear:
            part.__class__ = lora.Linear
