"""Rollouts of a policy: sample prompts step by step, score candidates or finished latents, select training rows."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
