"""Scores from servers of others: connection, forms of requests and replies, batches and cache."""

from latentreward.core.public_names import forwarding

__getattr__ = forwarding(__name__)
