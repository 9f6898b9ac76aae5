"""Inspection of data sets and score tables: counts, and reports as text and JSON."""
