"""Own taste: from a folder of own pictures to a reward and an aligned generator, in steps that resume."""
