"""Subcommands of the command line, one module each: a typed function, and ``run``, which parses its arguments."""
