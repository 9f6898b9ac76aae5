"""Alignment of a generator: policies, rollouts, rewards of a policy, losses, and one module a method."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
