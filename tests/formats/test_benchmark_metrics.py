"""Every protocol on the sample sets with the luminance scorer: the numbers of EXPECTED.json, whatever folder it is in.

A set that a folder lacks is skipped, a number that its EXPECTED.json lacks is a failure.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentreward.apps.evaluation.benchmark.base import Benchmark, BenchmarkPairs
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS, judge
from latentreward.apps.evaluation.benchmark.sets import PickAPicBenchmark, recognise_benchmark
from latentreward.core.reports.tables import Row
from latentreward.reward import CallableScorer
from latentreward.reward.scorers.pair_scoring import PairScoring
from tests.data.conftest import SCHEMA, pickapic_row
from tests.formats.conftest import COMMITTED, SAMPLES, expected_of

SETS = ("imagereward", "imagerewarddb", "hpdv2", "hpdv3", "pickapic_v1", "genai_bench", "genai_bench_cmu")


def luminance(prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
    """Mean of all pixels, in grey levels."""
    return torch.tensor([np.asarray(image, dtype=np.float64).mean() for image in images])


def scores(benchmark: Benchmark, temperature: float | None = None) -> dict[str, BenchmarkPairs]:
    scored = {}
    for split, reader in benchmark.readers().items():
        scoring = PairScoring(reader, [CallableScorer(luminance, "luminance", uses_prompt=False)])
        ((_, table),) = scoring.tables([range(len(reader))])
        scored[split] = benchmark.scored(split, table, "luminance")
        if temperature is not None:
            scored[split] = replace(scored[split], temperature=temperature)
    return scored


def results(benchmark: Benchmark, scored: dict[str, BenchmarkPairs]) -> dict[tuple[str, str], Row]:
    return {
        (item.protocol, item.split): judge(
            item.protocol, scored[item.split], scored[item.fitting] if item.fitting else None
        ).result()
        for item in benchmark.evaluations
    }


class Found:
    """One sample set through its benchmark, and what EXPECTED.json says of it."""

    def __init__(self, name: str) -> None:
        if not (SAMPLES / name).is_dir():
            pytest.skip(f"no {name} in {SAMPLES}")
        self.expected: dict[str, Any] = expected_of(name)
        self.metrics = self.expected.get("luminance_scorer", self.expected.get("luminance_scorer_before_removal", {}))
        self.benchmark = recognise_benchmark(str(SAMPLES / name))
        self.scored = scores(self.benchmark, self.metrics.get("temperature"))
        self.results = results(self.benchmark, self.scored)

    def check(self, protocol: str, split: str, name: str, *others: str) -> None:
        """The metric ``name`` is the protocol's number, or lies where images that are absent here may have put it."""
        result, expected = self.results[protocol, split], self.metrics[name]
        lost = unread(result)
        if "luminance_scorer" in self.expected or not lost:
            values = [
                result["estimate"].value,
                *(result["details"][other] for other in others if result["equal_scores"]),
            ]
            assert any(value == pytest.approx(expected, abs=1e-9) for value in values)
        elif not PROTOCOLS[protocol].macro:
            hits, total = result["estimate"].value * result["pairs"], result["pairs"] + lost
            assert hits / total <= expected + 1e-9
            assert expected <= (hits + lost) / total + 1e-9

    def count(self, name: str, value: int) -> None:
        """A number of rows is what EXPECTED.json says."""
        assert value == self.expected[name]


def unread(result: Row) -> int:
    return sum(number for reason, number in result["excluded"].items() if reason not in ("tie", "no label", "no vote"))


def test_imagereward() -> None:
    found = Found("imagereward")
    found.check("imagereward/micro", "test", "micro_acc")
    found.check("imagereward/macro", "test", "macro_acc_excl_all_tie")
    result = found.results["imagereward/micro", "test"]
    found.count("strict_pairs", result["pairs"] + unread(result) - _unread_ties(found.scored["test"]))
    found.count("all_pairs", result["pairs"] + sum(result["excluded"].values()))
    per_prompt = [value for value in found.metrics["per_prompt"] if value is not None and not np.isnan(value)]
    for value, (accuracy, whole) in zip(per_prompt, _per_prompt(found.scored["test"]), strict=True):
        assert not whole or accuracy == pytest.approx(value)


def _unread_ties(pairs: BenchmarkPairs) -> int:
    return int((np.isnan(pairs.first + pairs.second) & (pairs.labels == 0.5)).sum())


def _per_prompt(pairs: BenchmarkPairs) -> list[tuple[float, bool]]:
    """Accuracy of each prompt with a strict pair, in the order of the file, and whether all its images were read."""
    found = []
    for group in dict.fromkeys(pairs.groups):
        rows = np.array(pairs.groups) == group
        strict = rows & np.isin(pairs.labels, (0, 1))
        right = np.sign(pairs.first - pairs.second) == np.sign(pairs.labels - 0.5)
        if strict.any():
            found.append((float(right[strict].mean()), not np.isnan(pairs.first + pairs.second)[rows].any()))
    return found


def test_imagereward_db() -> None:
    found = Found("imagerewarddb")
    if found.metrics:  # the layout states none
        found.check("imagereward/micro", "test", "micro_acc")
    result = found.results["imagereward/micro", "test"]
    found.count("strict_pairs", result["pairs"] + unread(result) - _unread_ties(found.scored["test"]))


def test_hpdv2() -> None:
    found = Found("hpdv2")
    found.check("hpdv2/micro", "test", "micro_acc")
    found.check("hpdv2/macro", "test", "macro_inversion_score", "equal_scores_agree")
    result = found.results["hpdv2/macro", "test"]
    found.count("test_pairs", result["pairs"] + sum(result["excluded"].values()))


def test_hpdv3() -> None:
    found = Found("hpdv3")
    found.check("hpdv3", "test", "acc")
    result = found.results["hpdv3", "test"]
    assert result["equal_scores"] == found.metrics["equal"]
    assert result["estimate"].value * result["pairs"] == pytest.approx(found.metrics["correct"])


def test_pickapic() -> None:
    found = Found("pickapic_v1")
    found.check("pickapic/pickscore", "test_unique", "pickscore_test_acc")
    found.check("pickapic/lrm", "test_unique", "lrm_style_test_acc")
    details = found.results["pickapic/pickscore", "test_unique"]["details"]
    for name, key in {"threshold": "best_threshold", "credit_without_threshold": "pickscore_test_acc_thr0"}.items():
        assert details[name] == pytest.approx(found.metrics[key])
    assert details["credit_by_threshold"] == pytest.approx(found.metrics["val_scores_by_threshold"])


def test_genai_bench_tiger() -> None:
    found = Found("genai_bench")
    found.check("genai_bench_tiger/no_tie", "test", "acc_without_ties")
    found.count("strict_decodable", found.results["genai_bench_tiger/no_tie", "test"]["pairs"])


def test_genai_bench_cmu() -> None:
    found = Found("genai_bench_cmu")
    found.check("genai_bench_cmu", "train", "acc")
    result = found.results["genai_bench_cmu", "train"]
    found.count("strict", result["pairs"] + unread(result) - _unread_ties(found.scored["train"]))
    found.count("pairs", result["pairs"] + sum(result["excluded"].values()))


@pytest.mark.parametrize("name", SETS)
def test_rows_are_counted_or_left_out_for_a_reason(name: str) -> None:
    benchmark = recognise_benchmark(str(COMMITTED / name))
    scored = scores(benchmark)
    for (_, split), result in results(benchmark, scored).items():
        assert result["pairs"] > 0
        assert 0 <= result["estimate"].value <= 1
        assert result["pairs"] + sum(result["excluded"].values()) == len(scored[split].pair_ids)
        assert unread(result) == int(np.isnan(scored[split].first + scored[split].second).sum())
        assert "no score" not in result["excluded"]
    assert {item.protocol for item in benchmark.evaluations} <= set(PROTOCOLS)


def test_every_published_row_of_pickapic_counts_by_pickscore(tmp_path: Path) -> None:
    """All rows with both images, unlabelled ones as the second image's, as PickScore's code has it."""
    changes = [{}, {"label_0": 1.0, "label_1": 1.0}, {"has_label": False, "label_0": None}, {"jpg_0": b""}]
    table = pa.Table.from_pylist([pickapic_row(n, **change) for n, change in enumerate(changes)], SCHEMA)
    for split in ("train", "validation_unique"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    benchmark = PickAPicBenchmark(str(tmp_path), "train")
    scored = scores(benchmark)
    found = results(benchmark, scored)
    assert set(found["pickapic/pickscore", "train"]["excluded"]) == set(scored["train"].columns["problem"]) - {None}
    assert found["pickapic/lrm", "train"]["excluded"]["no label"] > 0
