"""Preference pairs: from files to batches of chosen and rejected pixels."""

from latentreward.data.collate import collate_pairs
from latentreward.data.datamodules import PreferenceDataModule
from latentreward.data.dataset import LoadedPair, PairDataset, SkippedPair
from latentreward.data.hpdv3 import HPDv3Reader
from latentreward.data.images import ImageError, PixelLoader, RootedImageRef, decode_image
from latentreward.data.pickapic import PickAPicReader
from latentreward.data.readers import PairReader
from latentreward.data.sampling import PairSampler
from latentreward.data.splits import normalise_prompt, select_rows

__all__ = [
    "HPDv3Reader",
    "ImageError",
    "LoadedPair",
    "PairDataset",
    "PairReader",
    "PairSampler",
    "PickAPicReader",
    "PixelLoader",
    "PreferenceDataModule",
    "RootedImageRef",
    "SkippedPair",
    "collate_pairs",
    "decode_image",
    "normalise_prompt",
    "select_rows",
]
