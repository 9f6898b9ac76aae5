"""Prompts for alignment, and the rows that a policy's rollouts leave to learn from."""
