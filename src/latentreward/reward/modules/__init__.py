"""LightningModules that train reward models and align policies."""
