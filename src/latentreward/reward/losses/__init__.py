"""Losses on scores of pairs."""
