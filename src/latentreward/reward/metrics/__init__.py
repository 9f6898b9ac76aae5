"""Metrics of preference models, as torchmetrics classes."""
