"""Export of a trained policy to the formats of diffusers and kohya's scripts."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
