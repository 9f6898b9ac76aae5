"""The policy, the text-to-image model that alignment trains: loading, adapters and predictions."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
