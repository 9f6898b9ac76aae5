"""Preference batches, and reward modules around tiny backbones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentreward.core.contracts import ImageRef, LatentSpace, PreferenceBatch, PreferencePair
from latentreward.data import LoadedPair, collate_pairs
from latentreward.reward import CLIPProjectionHead, DiNaLRMModule, GatedQFormerHead, LRMModule
from latentreward.reward.modules.reward import PairModule
from tests.diffusion.backbones.networks import tiny_backbone
from tests.tiny_pipelines import PIXELS

LABELS = (1.0, 0.0, 0.5, 0.8, 1.0, 0.25)


def pixels_of(key: str) -> Tensor:
    """The image of a name: the same wherever it occurs."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.rand(3, PIXELS, PIXELS, generator=generator) * 2 - 1


def loaded_pairs(count: int = 6, swap: bool = False, labels: Sequence[float | None] = LABELS) -> list[LoadedPair]:
    """Pairs with ties and soft labels; ``swap`` exchanges the sides of every one."""
    pairs = [
        PreferencePair(
            pair_id=f"pair{i}",
            prompt=f"a cat {i % 4}",
            image_a=ImageRef(f"left{i}"),
            image_b=ImageRef(f"right{i}"),
            label_a=labels[i % len(labels)],
            weight=1.0 + i % 3,
        )
        for i in range(count)
    ]
    pairs = [pair.swapped() for pair in pairs] if swap else pairs
    return [LoadedPair(p, pixels_of(p.image_a.image_key), pixels_of(p.image_b.image_key)) for p in pairs]


def taught_pairs(count: int = 6) -> list[LoadedPair]:
    """Pairs of :func:`loaded_pairs` with a teacher's scores and uncertainties; the last image has none."""
    generator = torch.Generator().manual_seed(0)
    scores, uncertainties = torch.randn(count, 2, 1, generator=generator), torch.rand(count, 2, 1, generator=generator)
    scores[-1, 1] = torch.nan
    targets = torch.stack([scores, uncertainties + 0.5], dim=2)
    return [replace(pair, targets=given) for pair, given in zip(loaded_pairs(count), targets, strict=True)]


def pixel_batch(count: int = 6, swap: bool = False, labels: Sequence[float | None] = LABELS) -> PreferenceBatch:
    return collate_pairs(loaded_pairs(count, swap, labels))


def rows(batch: PreferenceBatch, index: Sequence[int]) -> PreferenceBatch:
    """Some pairs of a batch, in the given order."""
    columns = {
        name: value[list(index)] if isinstance(value, Tensor) else tuple(value[i] for i in index)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor | tuple) and len(value) == len(batch)
    }
    return replace(batch, **columns)


def exchanged(batch: PreferenceBatch) -> PreferenceBatch:
    """The same pairs with all sides exchanged and the labels turned, past what collate would allow."""
    return replace(
        batch,
        chosen=batch.rejected,
        rejected=batch.chosen,
        chosen_keys=batch.rejected_keys,
        rejected_keys=batch.chosen_keys,
        label=1 - batch.label,
    )


def latent_batch(shape: Sequence[int], space: LatentSpace, count: int = 4) -> PreferenceBatch:
    """Pairs of random latents."""
    generator = torch.Generator().manual_seed(0)
    return replace(
        pixel_batch(count),
        chosen=torch.randn(count, *shape, generator=generator),
        rejected=torch.randn(count, *shape, generator=generator),
        latent_space=space,
    )


def dina_head(spec: Any) -> GatedQFormerHead:
    return GatedQFormerHead(spec, num_heads=2)


def lrm(
    name: str = "sd15", head: Any = CLIPProjectionHead, backbone: dict[str, Any] | None = None, **options: Any
) -> LRMModule:
    torch.manual_seed(0)
    return LRMModule(tiny_backbone(name, **(backbone or {})), head, seed=1, **options)


def dina(
    name: str = "sd35", head: Any = dina_head, backbone: dict[str, Any] | None = None, **options: Any
) -> DiNaLRMModule:
    torch.manual_seed(0)
    return DiNaLRMModule(tiny_backbone(name, **(backbone or {})), head, seed=1, **options)


MODULES = {"lrm": lrm, "dina": dina}


def scores_of(module: PairModule, batch: PreferenceBatch, epoch: int = 0) -> Any:
    """What a training step scores, before the loss."""
    from latentreward.reward.modules.reward import PairDraws

    draws = PairDraws(batch, module.seed, epoch)
    timesteps = draws.timesteps(module.levels, module.noise_process, module.timestep_per_image)
    encoded = module.encode(batch, draws, module.noise_per_image)
    return module.score(batch, encoded, timesteps, with_cross=module.loss.needs_cross_scores)
