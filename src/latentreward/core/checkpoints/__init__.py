"""Checkpoints: single files and folders of shards, read without running code, and the FSDP2 strategies."""
