"""Reward models that score noisy latents."""

from pathlib import Path

import latentreward.moved  # noqa: F401  so that earlier import paths resolve

__version__ = "0.1.0"

# In a source tree that was not installed (PYTHONPATH=src), callbacks/ and configs/ at its top are ours too.
_root = Path(__file__).resolve().parents[2]
if (_root / "setup.cfg").is_file() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))
