"""Evaluation of one generator, or comparison of two, by scorers of their pictures."""
