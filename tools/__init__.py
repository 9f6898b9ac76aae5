"""Programs of this repository that are not part of the package: they measure its claims and train its tiny networks."""
