"""Rollouts of a policy: sample prompts step by step, score candidates or finished latents, select training rows."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
