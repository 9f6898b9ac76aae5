"""Losses of alignment methods: on log-probabilities of sampler steps, rewards or predictions."""
