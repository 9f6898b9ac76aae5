from .alignment.prompts import PromptDataModule, PromptsAndImages
from .collate import collate_pairs
from .cut import CutReader
from .datamodules import PreferenceDataModule
from .dataset import LoadedPair, PairDataset, SkippedPair
from .images import ImageError, PixelLoader, decode_image
from .mpcf import MPCF, FilteredReader, select_consistent
from .readers.base import OnError, PairReader, count_text
from .readers.dataset_pairs import DatasetPairReader, JSONLPairReader
from .readers.diffusion_rm import DiffusionRMReader
from .readers.edits import EditPairReader
from .readers.folders import FolderPairReader
from .readers.img2dataset import Img2DatasetReader
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
from .sampling import PairBatchSampler, PairSampler
from .score_table import PairGaps, ScoreTable
from .splits import normalise_prompt, select_rows
from .streaming import PairStream, StreamedPreferenceDataModule
from .targets import ScoreTargets

__all__ = [
    "MPCF",
    "CutReader",
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
    "Img2DatasetReader",
    "JSONLPairReader",
    "LoadedPair",
    "OnError",
    "PairBatchSampler",
    "PairDataset",
    "PairGaps",
    "PairReader",
    "PairSampler",
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
