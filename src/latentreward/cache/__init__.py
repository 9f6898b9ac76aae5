"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""

from typing import Any

__all__ = ["CachedPreferenceDataModule", "CachedSplit"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use: what writes and checks a cache does not need it."""
    if name in __all__:
        from latentreward.cache import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
