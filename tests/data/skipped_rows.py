"""Which rows a data set has left out."""

from latentreward.data import PairDataset


def skipped_rows(dataset: PairDataset) -> list[int]:
    """Row numbers of the reader behind the counts of ``dataset.skipped()``, ascending."""
    return sorted(dataset.rows[dataset._problems.numpy() > 0].tolist())
