"""Claims and ablations of the papers, repeated in the tiny world: rows, their runs, results and verdicts."""
