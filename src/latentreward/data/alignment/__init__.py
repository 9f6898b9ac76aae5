"""Data modules for alignment: batches of prompts, and training batches made from a policy's rollouts."""
