"""Batches of estimates: of the size that training has, and refused where training refuses."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from latentreward.apps.estimate.batches import pair_batch
from latentreward.apps.estimate.shapes import ShapesOnly
from latentreward.core.registry import create_backbone
from latentreward.data.size_sampling import Sizing
from latentreward.diffusion import CachedPreferenceDataModule
from tests.diffusion.cache.written_caches import spec, write_cache
from tests.diffusion.families.twins import TWINS


def data_of(kind: type, **settings: Any) -> Namespace:
    return Namespace(class_path=f"{kind.__module__}.{kind.__name__}", init_args=Namespace(**settings))


def backbone_of(name: str) -> Any:
    twin = TWINS[name]
    return create_backbone(twin.backbone, source=twin.folder, visual_taps=[1], text_taps=[1], tuning="frozen")


def cache_of(folder: Path, backbone: Any, frames: int) -> Namespace:
    settings = spec(with_text=False, latent_space=backbone.latent_space, images={"size": (32, 48), "frames": frames})
    path = write_cache(folder, [{"image_a": 0, "image_b": 1}], [(32, 48)] * 2, spec=settings)
    train = Namespace(cache=str(path), split=None)
    return data_of(CachedPreferenceDataModule, train=train, tokens_per_batch=200, batch_size=8, cached_text=True)


def test_tokens_of_cached_clips_count_their_latent_frames(tmp_path: Path) -> None:
    backbone = backbone_of("wan21")
    batch = pair_batch(backbone, cache_of(tmp_path / "cache", backbone, frames=13), ShapesOnly())
    count, _, *axes = batch.chosen.shape
    assert (count, axes) == (2, [4, 4, 6])
    trained = Sizing(8, tokens_per_batch=200 // 4)  # CachedPreferenceDataModule divides by the latent frames
    assert trained.pairs_per_rank(4 * 6) == count
