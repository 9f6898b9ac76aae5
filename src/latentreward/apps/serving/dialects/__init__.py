"""Wire formats of other frameworks' clients, whose requests hold images and prompts."""

from latentreward.apps.serving.dialects.base import Dialect

__all__ = ["Dialect"]
