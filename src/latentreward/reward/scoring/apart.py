"""Comparison of two rows of a batch with each row alone, without padding, for parts of a user's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentreward.core.contracts import Conditioning, Features, map_tensors
from latentreward.core.errors import InputError
from latentreward.core.promises import has_values, place_of
from latentreward.core.registry import of_this_package
from latentreward.core.running import evaluating
from latentreward.diffusion import DiffusionBackbone, Family, NoiseProcess
from latentreward.diffusion.backbones.base import rows_of
from latentreward.reward.heads.base import RewardHead

EXACT, ROUNDED = 1e-3, 0.05
"""Largest differences as parts of the largest value: of float32 on a CPU and of scores, and of features elsewhere."""


def check_apart(
    backbone: DiffusionBackbone,
    head: RewardHead,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    shipped: bool = False,
) -> None:
    """Compare two rows of a batch with each row alone, in evaluation mode: features, then scores.

    A row alone has no padding: its text tokens are those of its mask. The rows get timesteps far apart, see
    :func:`far_timesteps`, and padding, see :func:`with_padding`.

    Raises:
        InputError: If they differ, for a backbone, family or head that is not of this package, or any with ``shipped``.
    """
    owner = getattr(backbone, "family", backbone) if of_this_package(type(backbone).__module__) else backbone
    own_features, own_scores = (shipped or not of_this_package(type(part).__module__) for part in (owner, head))
    if not (own_features or own_scores) or not all(map(has_values, (latents, *backbone.parameters()))):
        return
    timesteps, conditioning = far_timesteps(timesteps, backbone.noise_process), with_padding(conditioning)

    def features(rows: list[int], text: Conditioning) -> Features:
        return backbone(latents[rows], timesteps[rows], text, uncond and uncond.empty_for(rows))

    with torch.no_grad(), evaluating(backbone), evaluating(head):
        both = features([0, 1], conditioning.select([0, 1]))
        among = [rows_of(both, slice(row, row + 1)) for row in (0, 1)]
        if own_features:
            method = "read" if owner is backbone else "velocity"
            tolerance = tolerance_of(*floats_of(both))
            for row in (0, 1):  # a sum over the rows before leaves the first row as it is
                single = features([row], conditioning.select([row]).trimmed())
                for alone, one in zip(*map(floats_of, map(unpadded, (single, among[row]))), strict=True):
                    if alone.shape == one.shape:  # text of a backbone without a mask keeps its padding
                        check_equal(owner, method, alone.float(), one.float(), tolerance)
        if own_scores:
            with torch.autocast(latents.device.type, enabled=False):
                alone = torch.cat([head(unpadded(row).to(torch.float32)) for row in among])
                check_equal(head, "forward", alone, head(both.to(torch.float32)), EXACT)


def check_predictions(
    family: Family, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: float | None
) -> None:
    """Compare a family's predictions for the first and last row of a batch with those of each row alone.

    Rows are given as in :func:`check_apart`.

    Raises:
        InputError: If they differ.
    """
    # Ranks that share a network's weights must call it equally often, and their batches may differ.
    if is_sharded(network) or not all(map(has_values, (latents, *network.parameters()))):
        return
    ends = [0, len(latents) - 1]
    latents, timesteps = latents[ends], far_timesteps(timesteps[ends], family.noise_process)
    conditioning = with_padding(conditioning.select(ends))
    method = "velocity" if hasattr(family, "velocity") else "predict"
    with torch.no_grad(), evaluating(network):
        both = family.predict(network, latents, timesteps, conditioning, guidance)
        for row in (0, 1):
            text = conditioning.select([row]).trimmed()
            alone = family.predict(network, latents[[row]], timesteps[[row]], text, guidance)
            check_equal(family, method, alone.float(), both[[row]].float(), tolerance_of(both))


def is_sharded(network: nn.Module) -> bool:
    """Tell whether ranks hold shards of a network's weights (FSDP1 or FSDP2)."""
    wrapped = any(type(part).__name__ == "FullyShardedDataParallel" for part in network.modules())
    return wrapped or any(hasattr(weight, "full_tensor") for weight in network.parameters())


def far_timesteps(timesteps: Tensor, process: NoiseProcess) -> Tensor:
    """Return two timesteps: that of the first row, and of the highest and lowest of the process the more distant one.

    Rows of one timestep, as in validation and sampling, would not show a network that gives all rows that of the first.
    """
    first, levels = timesteps[0], process.timesteps[[0, -1]].to(timesteps)
    return torch.stack([first, levels[(levels - first).abs().argmax()]])


def with_padding(conditioning: Conditioning) -> Conditioning:
    """Count the last token of each prompt of several tokens as padding, where the prompts have a mask.

    Prompts of equal lengths would not show that padding counts. Tokens after the last one could exceed the number for
    which a network has positions.
    """
    if conditioning.prompt_mask is None:
        return conditioning
    mask = F.pad(conditioning.prompt_mask[:, 1:], (0, 1))
    mask[:, 0] = True
    return replace(conditioning, prompt_mask=mask)


def tolerance_of(*found: Tensor) -> float:
    """Return :data:`EXACT` for results that were computed in float32 on a CPU, else :data:`ROUNDED`."""
    exact = {(one.device.type, one.dtype) for one in found} == {("cpu", torch.float32)}
    return EXACT if exact and not torch.is_autocast_enabled("cpu") else ROUNDED


def check_equal(part: Any, method: str, alone: Tensor, among: Tensor, tolerance: float) -> None:
    """Raise InputError if a method's result for a row ``alone`` is not that ``among`` other rows."""
    error, largest = (alone - among).abs().max(), among.abs().max()
    if error > tolerance * largest + 1e-5:
        place = place_of(getattr(type(part), method))
        level = "," if method == "forward" else ", at its own timestep,"
        raise InputError(
            f"{type(part).__name__}.{method} returned values of a row alone that are up to {error:.3g} (of "
            f"{largest:.3g}) away from those of the same row in a batch{place}; compute each row from itself alone"
            f"{level} without statistics of the batch and text tokens outside the mask, and draw nothing at random"
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
