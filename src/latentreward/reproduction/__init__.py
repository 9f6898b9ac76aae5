"""Parts that the runs of ``latentreward reproduce`` name in their settings."""
