"""File storage: atomic writes, folder locks, tables in parts, progress lines, digests, and requests to the hub."""
