"""Frozen generators: noise, encoders, families of networks, the features that a reward reads, and the store of latents.

YAML may name a backbone's factory without its import path, such as ``sd15`` or ``sd35_medium``. Factories lie in the
files of their families (:mod:`latentreward.diffusion.families`), and ``from latentreward.diffusion import sd15`` finds
them too.
"""

from typing import Any

import lazy_loader

from latentreward.core.registry import backbone_names, factory_of
from latentreward.core.registry import create_backbone as create_backbone
from latentreward.core.registry import register_backbone as register_backbone

_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Return what this room exports, or the factory registered as ``name``, whose family is imported for it."""
    return factory_of(name) if name in backbone_names() else _exported(name)
