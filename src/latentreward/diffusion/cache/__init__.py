"""Latents and text embeddings on disk: written once by ``latentreward cache``, read in training."""

import lazy_loader

# Why our own format: exact resume, buckets and filters by pair need random access to rows. litdata and webdataset read
# in sequence, and mosaicml-streaming requires transformers below 5.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
