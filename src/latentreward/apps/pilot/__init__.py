"""Pilots: the shortest way from a data set to a reward and an aligned generator, in stages that resume."""
