"""LightningModules that train reward models."""
