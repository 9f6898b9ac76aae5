"""Data: preference pairs from files to batches of chosen and rejected pixels, and prompts for alignment."""

import importlib
from typing import TYPE_CHECKING, Any

from latentreward.data import readers
from latentreward.data.collate import collate_pairs
from latentreward.data.cut import CutReader
from latentreward.data.dataset import LoadedPair, PairDataset, SkippedPair
from latentreward.data.images import ImageError, PixelLoader, decode_image
from latentreward.data.mpcf import MPCF, FilteredReader, select_consistent
from latentreward.data.readers import *  # noqa: F403 - every reader in readers.__all__
from latentreward.data.sampling import PairBatchSampler, PairSampler
from latentreward.data.score_table import PairGaps, ScoreTable
from latentreward.data.splits import normalise_prompt, select_rows
from latentreward.data.streaming import PairStream
from latentreward.data.targets import ScoreTargets

if TYPE_CHECKING:
    from latentreward.data.alignment.prompts import PromptDataModule
    from latentreward.data.alignment.prompts_and_images import PromptsAndImages
    from latentreward.data.datamodules import PreferenceDataModule
    from latentreward.data.streamed_module import StreamedPreferenceDataModule

__all__ = [
    "MPCF",
    "CutReader",
    "FilteredReader",
    "ImageError",
    "LoadedPair",
    "PairBatchSampler",
    "PairDataset",
    "PairGaps",
    "PairSampler",
    "PairStream",
    "PixelLoader",
    "PreferenceDataModule",
    "PromptDataModule",
    "PromptsAndImages",
    "ScoreTable",
    "ScoreTargets",
    "SkippedPair",
    "StreamedPreferenceDataModule",
    "collate_pairs",
    "decode_image",
    "normalise_prompt",
    "select_consistent",
    "select_rows",
]
__all__ += readers.__all__

# These are imported on first use: readers alone do not need Lightning, which takes seconds to import.
DATA_MODULES = {
    "PreferenceDataModule": "latentreward.data.datamodules",
    "StreamedPreferenceDataModule": "latentreward.data.streamed_module",
    "PromptDataModule": "latentreward.data.alignment.prompts",
    "PromptsAndImages": "latentreward.data.alignment.prompts_and_images",
}


def __getattr__(name: str) -> Any:
    """Import a data module on first use."""
    if name in DATA_MODULES:
        return getattr(importlib.import_module(DATA_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
