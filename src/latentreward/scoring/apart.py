"""Comparison of two rows of a batch with each row alone, without padding, for backbones and heads of a user's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentreward.backbones.base import DiffusionBackbone, rows_of
from latentreward.contracts import Conditioning, Features, map_tensors
from latentreward.devices import evaluating
from latentreward.errors import InputError
from latentreward.heads import RewardHead
from latentreward.programs import of_this_package
from latentreward.promises import place_of

EXACT, ROUNDED = 1e-3, 0.05
"""Largest differences as parts of the largest value: of float32 on a CPU and of scores, and of features elsewhere."""


def check_apart(
    backbone: DiffusionBackbone,
    head: RewardHead,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
) -> None:
    """Compare two rows of a batch with each row alone, in evaluation mode: features, then scores.

    A row alone has no padding: its text tokens are those of its mask.

    Raises:
        InputError: If they differ, for a backbone, family or head that is not of this package.
    """
    owner = getattr(backbone, "family", backbone) if of_this_package(type(backbone).__module__) else backbone
    own_features, own_scores = (not of_this_package(type(part).__module__) for part in (owner, head))
    if latents.is_meta or not (own_features or own_scores):
        return

    def features(rows: list[int], text: Conditioning) -> Features:
        return backbone(latents[rows], timesteps[rows], text, uncond)

    with torch.no_grad(), evaluating(backbone), evaluating(head):
        both = features([0, 1], conditioning.select([0, 1]))
        among = [rows_of(both, slice(row, row + 1)) for row in (0, 1)]
        if own_features:
            method = "read" if owner is backbone else "step"
            exact = latents.device.type == "cpu" and {one.dtype for one in floats_of(both)} == {torch.float32}
            tolerance = EXACT if exact and not torch.is_autocast_enabled("cpu") else ROUNDED
            for row in (0, 1):  # a sum over the rows before leaves the first row as it is
                single = features([row], conditioning.select([row]).trimmed())
                for alone, one in zip(*map(floats_of, map(unpadded, (single, among[row]))), strict=True):
                    if alone.shape == one.shape:  # text of a backbone without a mask keeps its padding
                        check_equal(owner, method, alone.float(), one.float(), tolerance)
        if own_scores:
            with torch.autocast(latents.device.type, enabled=False):
                alone = torch.cat([head(unpadded(row).to(torch.float32)) for row in among])
                check_equal(head, "forward", alone, head(both.to(torch.float32)), EXACT)


def check_equal(part: Any, method: str, alone: Tensor, among: Tensor, tolerance: float) -> None:
    """Raise InputError if a method's result for a row ``alone`` is not that ``among`` other rows."""
    error, largest = (alone - among).abs().max(), among.abs().max()
    if error > tolerance * largest + 1e-5:
        place = place_of(getattr(type(part), method))
        raise InputError(
            f"{type(part).__name__}.{method} returned values of a row alone that are up to {error:.3g} (of "
            f"{largest:.3g}) away from those of the same row in a batch{place}; compute each row from itself alone, "
            "without statistics of the batch and text tokens outside the mask, and draw nothing at random"
        )


def unpadded(features: Features) -> Features:
    """Return the features of one row with the text tokens of its mask alone, also those of the empty prompt."""
    uncond = features.uncond and unpadded(features.uncond)
    if features.text_mask is None or not features.text_mask.any():
        return replace(features, uncond=uncond)
    kept = features.text_mask[0]
    text = tuple(tap[:, kept] for tap in features.text)
    return replace(features, text=text, text_mask=features.text_mask[:, kept], uncond=uncond)


def floats_of(features: Features) -> list[Tensor]:
    """Return the features that are floating-point tensors."""
    found: list[Tensor] = []
    map_tensors(features, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [tensor for tensor in found if tensor.is_floating_point()]
