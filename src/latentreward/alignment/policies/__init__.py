"""The policy, the text-to-image model that alignment trains: loading, adapters and predictions."""
