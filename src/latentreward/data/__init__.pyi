from .alignment.prompts import PromptDataModule, PromptsAndImages
from .datamodules import PreferenceDataModule
from .dataset import LoadedPair, PairDataset, SkippedPair, collate_pairs
from .images import ImageError, PixelLoader, decode_image
from .readers.base import OnError, PairReader, count_text
from .readers.dataset_pairs import DatasetPairReader, JSONLPairReader
from .readers.diffusion_rm import DiffusionRMReader
from .readers.edits import EditPairReader
from .readers.folders import FolderPairReader
from .readers.published import (
    GenAIBenchCMUReader,
    GenAIBenchReader,
    HPDv2Reader,
    HPDv3Reader,
    ImageRewardDBReader,
    ImageRewardReader,
    PickAPicReader,
)
from .readers.tars import PickAPicTarReader
from .sampling import PairBatchSampler
from .score_table import MPCF, FilteredReader, PairGaps, ScoreTable, ScoreTargets, select_consistent
from .splits import normalise_prompt, select_rows
from .streaming import PairStream, StreamedPreferenceDataModule

__all__ = [
    "MPCF",
    "DatasetPairReader",
    "DiffusionRMReader",
    "EditPairReader",
    "FilteredReader",
    "FolderPairReader",
    "GenAIBenchCMUReader",
    "GenAIBenchReader",
    "HPDv2Reader",
    "HPDv3Reader",
    "ImageError",
    "ImageRewardDBReader",
    "ImageRewardReader",
    "JSONLPairReader",
    "LoadedPair",
    "OnError",
    "PairBatchSampler",
    "PairDataset",
    "PairGaps",
    "PairReader",
    "PairStream",
    "PickAPicReader",
    "PickAPicTarReader",
    "PixelLoader",
    "PreferenceDataModule",
    "PromptDataModule",
    "PromptsAndImages",
    "ScoreTable",
    "ScoreTargets",
    "SkippedPair",
    "StreamedPreferenceDataModule",
    "collate_pairs",
    "count_text",
    "decode_image",
    "normalise_prompt",
    "select_consistent",
    "select_rows",
]
