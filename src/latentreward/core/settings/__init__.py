"""Reading and checking of settings from YAML files and command lines, with one-line errors."""
