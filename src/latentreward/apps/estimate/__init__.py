"""Estimate of a training run's memory and computation from its settings, without weights, data or a GPU.

The configured Lightning module runs its own training step on tensors that have a shape and dtype but no values.
"""
