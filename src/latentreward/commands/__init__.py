"""Subcommands beside the trainer's, one module each: a typed function, and ``run`` that gives it to the parser."""
