"""Reward models that score noisy latents."""

from pathlib import Path

from latentreward.core.errors import silence_libraries

__version__ = "0.2.0"

# setup.cfg maps callbacks/ and configs/, which lie beside src/, into this package. Without an installation
# (PYTHONPATH=src) that mapping is missing, and extending __path__ has the same effect.
_root = Path(__file__).resolve().parents[2]
if (_root / "setup.cfg").is_file() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))
silence_libraries(on_import=True)
