"""Scores from servers of others: connection, forms of requests and replies, batches and cache."""
