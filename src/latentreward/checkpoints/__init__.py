"""Checkpoints: as one file or in shards, how they are read without running code, and FSDP2, which shares them out."""
