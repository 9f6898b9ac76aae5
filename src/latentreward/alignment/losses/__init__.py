"""Losses of alignment methods: on log-probabilities of sampler steps, rewards or predictions."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
