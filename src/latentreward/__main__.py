"""``python -m latentreward``, the command line under the name that no other package can take."""

from latentreward.cli import main

main()
