"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""

from typing import Any

# Why our own format: mosaicml-streaming pins transformers below 5, litdata and webdataset read in sequence, and exact
# resume, buckets and filters by pair need rows by number.
__all__ = ["CachedPreferenceDataModule", "CachedSplit"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use: what writes and checks a cache does not need it."""
    if name in __all__:
        from latentreward.cache import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
