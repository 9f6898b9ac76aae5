"""Entry point of ``python -m latentreward``: the command line where the script ``latentreward`` is not on the path."""

from latentreward.apps.cli import main

main()
