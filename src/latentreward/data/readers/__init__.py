"""Readers of preference pairs: one module per data format; every reader is a :class:`PairReader`."""

from latentreward.data.readers.base import OnError, PairReader, count_text
from latentreward.data.readers.dataset_pairs import DatasetPairReader
from latentreward.data.readers.diffusion_rm import DiffusionRMReader
from latentreward.data.readers.folders import FolderPairReader
from latentreward.data.readers.genai_bench import GenAIBenchReader
from latentreward.data.readers.genai_bench_cmu import GenAIBenchCMUReader
from latentreward.data.readers.hpdv2 import HPDv2Reader
from latentreward.data.readers.hpdv3 import HPDv3Reader
from latentreward.data.readers.imagereward import ImageRewardDBReader, ImageRewardReader
from latentreward.data.readers.img2dataset import Img2DatasetReader
from latentreward.data.readers.jsonl import JSONLPairReader
from latentreward.data.readers.pickapic import PickAPicReader
from latentreward.data.readers.pickapic_tars import PickAPicTarReader

__all__ = [
    "DatasetPairReader",
    "DiffusionRMReader",
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
