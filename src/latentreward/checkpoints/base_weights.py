"""Which pretrained weights a small checkpoint belongs to: a few values of each frozen tensor."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from latentreward.errors import InputError

VALUES = 4
RELATIVE, ABSOLUTE = 0.01, 1e-6
"""How far values may differ: rounding to bfloat16 moves a value by up to 0.4 %, to float16 by up to 3e-8."""
T = TypeVar("T")


@dataclass(frozen=True)
class BaseSample:
    """Values of frozen weights, spread evenly over each tensor: the same for one base in any precision.

    Attributes:
        source: Where the base came from, for messages.
        values: Name of a frozen parameter → its :data:`VALUES` values.
    """

    source: str
    values: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, source: str) -> Self:
        """Sample the frozen parameters of ``module``, which must not be sharded yet.

        Adapters are no part of a base: those that nothing reads are random, those of rewards come and go.
        """
        frozen = {
            name: weight.detach()
            for name, weight in module.named_parameters()
            if not weight.requires_grad and ".lora_" not in name
        }
        return cls(source, {name: sample(weight) for name, weight in frozen.items() if not weight.is_meta})

    def record(self, saved: Collection[str]) -> dict[str, Any]:
        """What a checkpoint keeps: the values of weights that it does not hold itself, as ``saved`` names them."""
        names = [name for name in self.values if name not in saved]
        values = torch.stack([self.values[name] for name in names]) if names else torch.zeros(0, VALUES)
        return {"source": self.source, "names": names, "values": values}

    def check(self, record: dict[str, Any]) -> None:
        """Compare with the record of a checkpoint.

        Raises:
            InputError: If a weight that both name differs.
        """
        for name, theirs in zip(record["names"], record["values"], strict=True):
            ours = self.values.get(name)
            if ours is not None and not same_values(ours, theirs):
                raise InputError(
                    f"the checkpoint belongs to the base {record['source'] or 'of another module'}, whose {name} "
                    f"differs from that of {self.source or 'this one'}; set source to the base it was trained on"
                )


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two :func:`sample` results are of one tensor, perhaps in two precisions."""
    return torch.allclose(ours, theirs.to(ours), rtol=RELATIVE, atol=ABSOLUTE)


def sample(weight: Tensor) -> Tensor:
    """:data:`VALUES` values of a tensor, first and last included, float32 on the CPU."""
    index = torch.linspace(0, weight.numel() - 1, VALUES, dtype=torch.float64).long()
    return weight.reshape(-1)[index.to(weight.device)].float().cpu()


def without_adapters(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield what belongs to a network itself, under the names that it has without adapters."""
    return ((name.replace(".base_layer.", "."), value) for name, value in named if ".lora_" not in name)
