"""Comparison of two rows of a batch with each row alone, for backbones and heads of a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentreward.backbones.base import DiffusionBackbone, rows_of
from latentreward.contracts import Conditioning, Features, map_tensors
from latentreward.errors import InputError
from latentreward.heads import RewardHead
from latentreward.programs import of_this_package
from latentreward.promises import place_of

FEATURES, SCORES = 0.05, 1e-3
"""Largest differences, as parts of the largest value: features may be products in bfloat16, scores are float32."""


def check_apart(
    backbone: DiffusionBackbone,
    head: RewardHead,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
) -> None:
    """Compare two rows of a batch with each row alone, in evaluation mode: features, then scores.

    Raises:
        InputError: If they differ, for a backbone, family or head that is not of this package.
    """
    owner = getattr(backbone, "family", backbone) if of_this_package(type(backbone).__module__) else backbone
    own_features, own_scores = (not of_this_package(type(part).__module__) for part in (owner, head))
    if latents.is_meta or not (own_features or own_scores):
        return

    def features(rows: list[int]) -> Features:
        return backbone(latents[rows], timesteps[rows], conditioning.select(rows), uncond)

    with torch.no_grad(), evaluating(backbone), evaluating(head):
        both = features([0, 1])
        among = [rows_of(both, slice(row, row + 1)) for row in (0, 1)]
        if own_features:
            method = "read" if owner is backbone else "step"
            for row in (0, 1):  # a sum over the rows before leaves the first row as it is
                for alone, one in zip(floats_of(features([row])), floats_of(among[row]), strict=True):
                    check_equal(owner, method, alone, one, FEATURES)
        if own_scores:
            with torch.autocast(latents.device.type, enabled=False):
                alone = torch.cat([head(row.to(torch.float32)) for row in among])
                check_equal(head, "forward", alone, head(both.to(torch.float32)), SCORES)


def check_equal(part: Any, method: str, alone: Tensor, among: Tensor, tolerance: float) -> None:
    """Raise InputError if a method's result for a row ``alone`` is not that ``among`` other rows."""
    error, largest = (alone - among).abs().max(), among.abs().max()
    if error > tolerance * largest + 1e-4:
        place = place_of(getattr(type(part), method))
        raise InputError(
            f"{type(part).__name__}.{method} returned values of a row alone that are up to {error:.3g} (of "
            f"{largest:.3g}) away from those of the same row in a batch{place}; compute each row from "
            "itself alone, without statistics of the batch, and draw nothing at random"
        )


def floats_of(features: Features) -> list[Tensor]:
    """Return the features that are floating-point tensors, as float32."""
    found: list[Tensor] = []
    map_tensors(features, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [tensor.float() for tensor in found if tensor.is_floating_point()]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block with ``module`` in evaluation mode; afterwards restore the mode of each submodule."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
