"""Heads: networks that compute a score from a backbone's features."""
