"""Evaluation of reward models on labelled pairs (``benchmark``) and of generators by scorers (``policy``)."""
