"""Sampling of images from a policy: loading; best of N and step-wise search by a reward; files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
