"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""

from typing import Any

# Why our own format: exact resume, buckets and filters by pair need random access to rows. litdata and webdataset read
# in sequence, and mosaicml-streaming requires transformers below 5.
__all__ = ["CachedPreferenceDataModule", "CachedSplit"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use, because writing and checking a cache do not need it."""
    if name in __all__:
        from latentreward.cache import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
