"""Rewards for alignment: latent reward models, pixel scorers, own functions, random controls, and mixtures."""
