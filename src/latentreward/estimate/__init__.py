"""Memory and computation of a training run from its settings alone: no weights, no data, no GPU.

The configured Lightning module runs its own training step on tensors that have shapes and no numbers.
"""
