"""Preference benchmarks of reward models, evaluated by their published protocols."""

from latentreward.evaluation.benchmark.base import Benchmark
from latentreward.evaluation.benchmark.sets import (
    GenAIBenchCMUBenchmark,
    GenAIBenchTigerBenchmark,
    HPDv2Benchmark,
    HPDv3Benchmark,
    ImageRewardBenchmark,
    ImageRewardDBBenchmark,
    PairsBenchmark,
    PickAPicBenchmark,
)

__all__ = [
    "Benchmark",
    "GenAIBenchCMUBenchmark",
    "GenAIBenchTigerBenchmark",
    "HPDv2Benchmark",
    "HPDv3Benchmark",
    "ImageRewardBenchmark",
    "ImageRewardDBBenchmark",
    "PairsBenchmark",
    "PickAPicBenchmark",
]
