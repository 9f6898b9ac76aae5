"""Backbones: parts of diffusion networks that compute features from noisy latents.

YAML may name a factory without its import path, such as ``sd15`` or ``sd35_medium``. Factories lie in the files of
their families (:mod:`latentreward.families`), and ``from latentreward.backbones import sd15`` finds them too.
"""

from typing import Any

import lazy_loader

from latentreward.backbones.registry import backbone_names, factory_of

_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Return what this package exports, or the factory registered as ``name``, whose family is imported for it."""
    return factory_of(name) if name in backbone_names() else _exported(name)
