"""Noise processes (latents to noisy latents) and samplers of noise levels."""
