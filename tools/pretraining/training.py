"""Training loops, settings and descriptions that the tiny world's networks share."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import Any, Self

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from latentreward.core.storage.progress import Progress


@dataclass(frozen=True)
class TrainingRecipe:
    """Training settings that can be scaled down for a quick trial."""

    def scaled(self, factor: float) -> Self:
        """Return a copy with ``factor`` times the steps, pictures, pairs and prompts, at least 2 of each."""
        names = [name for name in asdict(self) if name.endswith(("pictures", "steps", "pairs", "prompts"))]
        return replace(self, **{name: max(2, round(factor * getattr(self, name))) for name in names})


def readme(name: str, **figures: object) -> str:
    """Return the README of a network with its figures, from ``readmes.yaml``."""
    texts = yaml.safe_load(Path(__file__).with_name("readmes.yaml").read_text(encoding="utf-8"))
    return Template(texts[name]).substitute(figures)


def train_averaged(
    model: nn.Module,
    losses: Iterator[Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    warmup: int,
    decay: float,
    **adamw: Any,
) -> None:
    """Train with AdamW, warm-up and linear decay to zero, and set the model's averaged weights at the end.

    Parameters that require gradients are trained in place, one step per loss, with the peak learning rate ``lr``.
    ``decay`` is that of the exponential moving average; ``name`` labels the progress lines; ``adamw`` holds further
    settings of the optimiser.
    """
    averaged = deepcopy(model).requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), **adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    for step in updates(optimizer, schedule, losses, steps, name):
        current = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(averaged.parameters()), current, 1 - min(decay, (step + 1) / (step + 10)))
    model.load_state_dict(averaged.state_dict())


def updates(
    optimizer: Optimizer, schedule: LRScheduler, losses: Iterable[Tensor], steps: int, name: str
) -> Iterator[int]:
    """Update weights once per loss, with gradients clipped at norm 1; yield the number of each update, from 1."""
    (group,) = optimizer.param_groups
    progress = Progress(name, steps, "steps")
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        yield step
        progress.add(loss=loss.item())
