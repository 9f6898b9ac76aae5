"""A reward model on disk: how each layout is recognised, read and written."""
