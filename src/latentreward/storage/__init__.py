"""Files, folders and what lies around them: written whole, locked, fetched, measured and named in one way."""
