"""Reward models (a backbone with a head) that load from files and score images, and loaders of the papers' models."""
