"""Construction of training batches of the configured size from stand-in tensors; no data is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule

from latentreward.alignment import AlignmentModule, DiffusionDPOModule, Policy, ReFLModule, StepAwarePixelModule
from latentreward.apps.estimate.shapes import ShapesOnly, is_stand_in
from latentreward.core.contracts import (
    Conditioning,
    EditPrompt,
    LatentSpace,
    PreferenceBatch,
    PromptBatch,
    map_tensors,
    take_rows,
)
from latentreward.core.errors import InputError, check_multiples
from latentreward.core.running import evaluating
from latentreward.data import PromptsAndImages
from latentreward.data.clips import FPS, check_clips, check_frames
from latentreward.data.dataset import stack_targets
from latentreward.diffusion import CachedPreferenceDataModule
from latentreward.diffusion.cache.store import SPEC, CacheSpec, read_plan
from latentreward.diffusion.encoders.vae import edit_of_grey
from latentreward.reward import RewardModule

NETWORKS = {DiffusionDPOModule: "policy", StepAwarePixelModule: "generator", RewardModule: "model.backbone"}
"""Module that learns from pairs → its attribute with the network whose size and space the pairs have."""


def make_batch(module: LightningModule, data: Namespace, shapes: ShapesOnly) -> Any:
    """Make a training batch for ``module``; a module that learns from rollouts makes a rollout first.

    ReFL's ``stop_range`` is set to the latest stop.
    """
    prompts, images = data, None
    if issubclass(locate(data.class_path), PromptsAndImages):
        prompts, images = data.init_args.prompts, data.init_args.images
    if isinstance(module, AlignmentModule) and (sampling := getattr(module, "sampling", None)) is not None:
        module.policy.edit_at(sampling.height, sampling.width)
    if isinstance(module, AlignmentModule) and module.experience:
        told = prompt_batch(module.policy, data.init_args.prompts_per_rollout)
        with evaluating(module), torch.no_grad(), module.compute_precision():
            # Not `roll_out`, which refuses a key of several rows: stand-ins select the same step each time.
            rows: Any = module.make_experience(told)
        shapes.rollout_rows = len(rows)
        chosen = take_rows(rows, [number % len(rows) for number in range(batch_size(data))])
        module.prepare_prompts(told.prompts)
        return map_tensors(chosen, lambda t: shapes.stand_in(t.shape, t.dtype) if is_stand_in(t) else t)
    if isinstance(module, ReFLModule):
        module.stop_range = (module.stop_range[0],) * 2  # the latest stop, which takes the most steps
        batch = prompt_batch(module.policy, batch_size(prompts))
        return batch if images is None else {"prompts": batch, "images": pair_batch(module.policy, images, shapes)}
    for kind, network in NETWORKS.items():
        if isinstance(module, kind):
            return pair_batch(attrgetter(network)(module), data, shapes)
    raise InputError(f"--estimate does not know what batches a {type(module).__name__} takes; it knows our own modules")


def pair_batch(network: Any, data: Namespace, shapes: ShapesOnly) -> PreferenceBatch:
    """Make a batch of pairs, of images or cached latents, as ``data`` would; each pair has its own prompt."""
    settings, space = data.init_args, network.latent_space
    latents = issubclass(locate(data.class_path), CachedPreferenceDataModule)
    (height, width), count, with_text = network.native_size, batch_size(data), False
    frames = settings.get("frames") or 1
    if latents:
        caches = written_caches(settings)
        if train := caches.get("train"):
            frames = train.images.frames
            (height, width), count = largest_batch(data, train.images.sizes(), frames, space)
        with_text = settings.cached_text and all(cache.text is not None for cache in caches.values())
    elif (size := settings.get("size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
        check_multiples("data.size", (height, width), network.side_multiple)
    check_clips("data.", frames, settings.get("fps") or FPS)
    if frames > 1:
        check_frames("the cache has images." if latents else "data.", network, frames)
    clip = (3, height, width) if frames == 1 else (3, frames, height, width)
    shape = space.shape(height, width, frames) if latents else clip
    names = tuple(str(number) for number in range(count))
    targets = None
    if (given := settings.get("targets")) is not None:
        kinds, columns = 2 if given.uncertainties else 1, len(given.columns)
        targets = stack_targets([shapes.stand_in((2, kinds, columns)) for _ in names])
    encoder = network.text_encoder

    def encoded(rows: int) -> Conditioning:  # prompts of the greatest length
        pooled = shapes.stand_in((rows, encoder.pooled_dim)) if encoder.pooled_dim else None
        mask = torch.ones(rows, encoder.num_tokens, dtype=torch.bool) if encoder.masked else None
        return Conditioning(shapes.stand_in((rows, encoder.num_tokens, encoder.token_dim)), pooled, mask)

    return PreferenceBatch(
        pair_ids=names,
        prompts=prompts_for(network, count),
        chosen=shapes.stand_in((count, *shape)),
        rejected=shapes.stand_in((count, *shape)),
        chosen_keys=tuple(f"{name} chosen" for name in names),
        rejected_keys=tuple(f"{name} rejected" for name in names),
        label=torch.ones(count),
        targets=targets,
        weight=torch.ones(count),
        latent_space=space if latents else None,
        conditioning=encoded(count) if with_text else None,
        uncond=encoded(1) if with_text else None,
        sources=tuple(shapes.stand_in((count, *shape)) for _ in range(counted_sources(network))),
    )


def prompt_batch(policy: Policy, count: int) -> PromptBatch:
    """Make a batch of ``count`` different prompts."""
    return PromptBatch(prompts_for(policy, count), tuple(f"0/{n}" for n in range(count)))


def prompts_for(network: Any, count: int) -> tuple[str, ...]:
    """Make ``count`` different prompts, each of as many pictures of its own as an editor needs."""
    (grey,), texts = edit_of_grey().sources, [f"prompt {number}" for number in range(count)]
    places = range(counted_sources(network))
    return tuple(EditPrompt(text, [replace(grey, image_key=f"{text}, {place}") for place in places]) for text in texts)


def counted_sources(network: Any) -> int:
    """Return the least number of pictures that a policy or a backbone edits; 1 if it edits 1 or none."""
    least, most = getattr(network, "family", network).sources
    return least or int(most == 1)


def batch_size(data: Namespace) -> int:
    """Return the batch size in the settings of a data module; raise InputError if they have none."""
    if (count := data.init_args.get("batch_size")) is None:
        raise InputError(f"data: {data.class_path} has no setting batch_size, which --estimate needs")
    return count


def written_caches(settings: Namespace) -> dict[str, CacheSpec]:
    """Return the settings of a data module's caches by split, of those that are written."""
    splits = ((name, settings.get(name)) for name in ("train", "val", "test", "predict"))
    folders = {name: Path(split.cache) for name, split in splits if isinstance(split, Namespace) and "cache" in split}
    return {name: read_plan(folder).spec for name, folder in folders.items() if (folder / SPEC).is_file()}


def largest_batch(
    data: Namespace, sizes: Sequence[tuple[int, int]], frames: int, space: LatentSpace
) -> tuple[tuple[int, int], int]:
    """Return the size whose batches hold the most pixels, and their number of pairs; clips have several ``frames``."""

    def pairs(size: tuple[int, int]) -> int:
        if (tokens := data.init_args.get("tokens_per_batch")) is None:
            return batch_size(data)
        return max(1, tokens // math.prod(space.shape(*size, frames)[1:]))

    size = max(sizes, key=lambda size: pairs(size) * math.prod(size))
    return size, pairs(size)
