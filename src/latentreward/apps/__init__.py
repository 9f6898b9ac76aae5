"""Applications of the science beside this folder: commands, service, benchmarks, estimates, taste.

Nothing outside this folder imports it, except the table of commands in ``cli.py``.
"""
