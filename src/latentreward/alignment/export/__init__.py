"""Export of a trained policy to the formats of diffusers and kohya's scripts."""
