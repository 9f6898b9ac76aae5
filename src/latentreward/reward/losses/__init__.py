"""Losses on scores of pairs, log-probabilities of sampler steps, rewards or predictions."""
