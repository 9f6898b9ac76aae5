from .base import OnError, PairReader, count_text
from .dataset_pairs import DatasetPairReader
from .diffusion_rm import DiffusionRMReader
from .edits import EditPairReader
from .folders import FolderPairReader
from .genai_bench import GenAIBenchReader
from .genai_bench_cmu import GenAIBenchCMUReader
from .hpdv2 import HPDv2Reader
from .hpdv3 import HPDv3Reader
from .imagereward import ImageRewardDBReader, ImageRewardReader
from .img2dataset import Img2DatasetReader
from .jsonl import JSONLPairReader
from .pickapic import PickAPicReader
from .pickapic_tars import PickAPicTarReader

__all__ = [
    "DatasetPairReader",
    "DiffusionRMReader",
    "EditPairReader",
    "FolderPairReader",
    "GenAIBenchCMUReader",
    "GenAIBenchReader",
    "HPDv2Reader",
    "HPDv3Reader",
    "ImageRewardDBReader",
    "ImageRewardReader",
    "Img2DatasetReader",
    "JSONLPairReader",
    "OnError",
    "PairReader",
    "PickAPicReader",
    "PickAPicTarReader",
    "count_text",
]
