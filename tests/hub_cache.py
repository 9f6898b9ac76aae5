"""Folders laid out as the local cache of the hub."""

from pathlib import Path


def cached_sd35(cache: Path) -> Path:
    """Lay out SD3.5-Medium without weights in a cache; returns the folder of the snapshot."""
    repository = cache / "models--stabilityai--stable-diffusion-3.5-medium"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model_index.json").write_text("{}")
    return snapshot
