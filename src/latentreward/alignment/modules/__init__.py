"""LightningModules that align policies, one file a method."""
