"""Scorers that run another program in its own Python environment, or read scores that it wrote."""

from latentreward.scorers.tools.base import JudgedPicture, ToolScorer
from latentreward.scorers.tools.command import CommandScorer, HPSv3Scorer, ImageRewardScorer
from latentreward.scorers.tools.geneval import GenEvalScorer
from latentreward.scorers.tools.score_file import ScoreFile
from latentreward.scorers.tools.t2i_compbench import T2ICompBenchScorer

__all__ = [
    "CommandScorer",
    "GenEvalScorer",
    "HPSv3Scorer",
    "ImageRewardScorer",
    "JudgedPicture",
    "ScoreFile",
    "T2ICompBenchScorer",
    "ToolScorer",
]
