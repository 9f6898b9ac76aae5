"""Sources of preference pairs: one module per published format, all behind :class:`PairReader`."""

from latentreward.data.readers.base import OnError, PairReader, count_text
from latentreward.data.readers.diffusion_rm import DiffusionRMReader
from latentreward.data.readers.hpdv3 import HPDv3Reader
from latentreward.data.readers.pickapic import PickAPicReader
from latentreward.data.readers.pickapic_tars import PickAPicTarReader

__all__ = [
    "DiffusionRMReader",
    "HPDv3Reader",
    "OnError",
    "PairReader",
    "PickAPicReader",
    "PickAPicTarReader",
    "count_text",
]
