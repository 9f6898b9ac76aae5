from .base import Benchmark
from .sets import (
    EditRewardBenchmark,
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
    "EditRewardBenchmark",
    "GenAIBenchCMUBenchmark",
    "GenAIBenchTigerBenchmark",
    "HPDv2Benchmark",
    "HPDv3Benchmark",
    "ImageRewardBenchmark",
    "ImageRewardDBBenchmark",
    "PairsBenchmark",
    "PickAPicBenchmark",
]
