from .base import Benchmark
from .sets import (
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
