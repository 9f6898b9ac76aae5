"""A check that a checkpoint without frozen weights is loaded onto the pretrained base that it was trained on.

The checkpoint records a few values of each frozen tensor, which are compared with the base when it is loaded.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from latentreward.core.errors import InputError

VALUES = 4  # number of values recorded per tensor
RELATIVE, ABSOLUTE = 0.01, 1e-6
"""Tolerances for equal values: rounding to bfloat16 moves a value by up to 0.4 %, to float16 by up to 3e-8."""
KEPT = "weight_sample"  # attribute of a quantised layer: sample of the weight that its files hold
T = TypeVar("T")


@dataclass(frozen=True)
class BaseSample:
    """A few values of each frozen weight, spread evenly over the tensor, equal up to rounding in every precision."""

    source: str  # Folder or hub id that the base was loaded from, for error messages
    values: dict[str, Tensor]  # Name of a frozen parameter → its :data:`VALUES` sampled values

    @classmethod
    def of(cls, module: nn.Module, source: str) -> Self:
        """Sample the frozen parameters of ``module``, not sharded yet, without LoRAs, which are not of the base."""
        frozen = {
            name: sample_in(module, name)
            for name, weight in module.named_parameters()
            if not weight.requires_grad and not weight.is_meta and ".lora_" not in name
        }
        return cls(source, frozen)

    def record(self, saved: Collection[str]) -> dict[str, Any]:
        """Return the record for a checkpoint: source, names and values of the weights that are not ``saved`` in it."""
        names = [name for name in self.values if name not in saved]
        values = torch.stack([self.values[name] for name in names]) if names else torch.zeros(0, VALUES)
        return {"source": self.source, "names": names, "values": values}

    def check(self, record: dict[str, Any]) -> None:
        """Compare the sampled values with a checkpoint's record; raises InputError if a weight in both differs."""
        if problem := problem_of_record(record):
            raise InputError(f"the checkpoint's record of its base is damaged: {problem}; get the checkpoint again")
        for name, theirs in zip(record["names"], record["values"], strict=True):
            ours = self.values.get(name)
            if ours is not None and not same_values(ours, theirs):
                raise InputError(
                    f"the checkpoint belongs to the base {record['source'] or 'of another module'}, whose {name} "
                    f"differs from that of {self.source or 'this one'}; set source to the base it was trained on"
                )


def problem_of_record(record: Any) -> str | None:
    """Tell why a value is not what :meth:`BaseSample.record` returns; None if it is."""
    if not isinstance(record, Mapping) or not {"source", "names", "values"} <= {*record}:
        return "it lacks source, names or values"
    names, values = record["names"], record["values"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "names is not a list of names"
    if not isinstance(values, Tensor) or values.shape != (len(names), VALUES) or values.is_meta:
        return f"values is not a tensor of {VALUES} numbers for each name"
    return None


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two results of :func:`sample` agree up to rounding, as for one tensor in two precisions."""
    return torch.allclose(ours, theirs.to(ours), rtol=RELATIVE, atol=ABSOLUTE)


def sample(weight: Tensor) -> Tensor:
    """Take :data:`VALUES` evenly spaced values of a tensor, first and last included, as float32 on the CPU."""
    index = torch.linspace(0, weight.numel() - 1, VALUES, dtype=torch.float64).long()
    return weight.reshape(-1)[index.to(weight.device)].float().cpu()


def sample_in(module: nn.Module, name: str) -> Tensor:
    """Sample the parameter ``name`` of a module; a quantised one has the values that :func:`keep_sample` kept."""
    weight = module.get_parameter(name)
    if not is_quantized(weight):  # asked before detach, which makes plain tensors of bitsandbytes' weights
        return sample(weight.detach())
    kept: Tensor = getattr(module.get_submodule(name.rpartition(".")[0]), KEPT)
    return kept


def keep_sample(layer: nn.Module, values: Tensor) -> None:
    """Keep ``values``, the sample of a layer's weight, on the layer: its weight is quantised."""
    setattr(layer, KEPT, values)


def quantized_names(module: nn.Module) -> set[str]:
    """Return the state-dict entries of a module's quantised layers but for what trains.

    Those of their library are among them: bitsandbytes writes scales and code books that it does not read again.
    """
    names = set[str]()
    for name, layer in module.named_modules():
        if hasattr(layer, KEPT):
            trains = {own for own, parameter in layer.named_parameters() if parameter.requires_grad}
            names |= {f"{name}.{own}" for own in layer.state_dict(keep_vars=True).keys() - trains}
    return names


def is_quantized(weight: Tensor) -> bool:
    """Tell whether a parameter that is not sharded holds quantised values: of a tensor class of another library."""
    return type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor


def without_adapters(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield the (name, value) entries of a network that are not LoRA weights, under their names without adapters."""
    return ((name.replace(".base_layer.", "."), value) for name, value in named if ".lora_" not in name)
