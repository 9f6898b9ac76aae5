"""Counts over data sets and score tables, as text and as JSON."""
