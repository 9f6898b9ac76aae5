"""Settings: how YAML files and command lines are read, checked and, where wrong, refused in one line."""
