"""Benchmarks opened from folders: which protocols follow, what is missing, what pairs are told apart by."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from latentreward.apps.evaluation.benchmark import sets
from latentreward.apps.evaluation.benchmark.base import Benchmark
from latentreward.apps.evaluation.benchmark.evaluate import LOOKED_INTO
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS
from latentreward.apps.evaluation.benchmark.sets import recognise_benchmark
from latentreward.core.errors import InputError
from latentreward.reward import CallableScorer
from latentreward.reward.scorers.pair_scoring import PairScoring
from tests.formats.conftest import COMMITTED, encode
from tests.formats.test_benchmark_metrics import results, scores

FOLDERS = {
    "imagereward": sets.ImageRewardBenchmark,
    "imagerewarddb": sets.ImageRewardDBBenchmark,
    "hpdv2": sets.HPDv2Benchmark,
    "hpdv3": sets.HPDv3Benchmark,
    "pickapic_v1": sets.PickAPicBenchmark,
    "genai_bench": sets.GenAIBenchTigerBenchmark,
    "genai_bench_cmu": sets.GenAIBenchCMUBenchmark,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_known(folder) -> None:
    benchmark = recognise_benchmark(str(COMMITTED / folder))
    assert type(benchmark) is FOLDERS[folder]
    assert set(benchmark.protocols) <= set(PROTOCOLS)
    assert tuple(benchmark.readers()) == benchmark.splits


def test_every_protocol_has_a_data_set() -> None:
    keys = {key for folder in FOLDERS for key in recognise_benchmark(str(COMMITTED / folder)).protocols}
    assert keys | {*sets.EditRewardBenchmark.keys, "pairs/strict", "pairs/soft"} == set(PROTOCOLS)


@pytest.mark.parametrize("kind", Benchmark.__subclasses__())
def test_one_protocol_of_each_data_set_is_looked_into(kind: type[Benchmark]) -> None:
    assert len({*kind.keys} & {*LOOKED_INTO}) == 1


@pytest.fixture
def ranked_edits(tmp_path: Path) -> Path:
    """Two groups of two results, one a tie, and a group of three, of one instruction for unlike pictures."""
    rows = []
    for number, (made, ranking) in enumerate([("ab", "A>B"), ("cd", "A=B"), ("efg", "A>B=C")]):
        for place, name in enumerate(f"{number}{made}"):
            (tmp_path / f"{name}.jpg").write_bytes(encode(seed=40 * number + 10 * place))
        paths = [f"{name}.jpg" for name in made]
        row = {"prompt": "make it red", "path_src": f"{number}.jpg", "paths_generated": paths}
        rows.append({**row, "human_vote": {"ranking": ranking}})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return tmp_path


def test_ranked_edits_are_judged_by_groups(ranked_edits: Path) -> None:
    benchmark = recognise_benchmark(str(ranked_edits))
    assert type(benchmark) is sets.EditRewardBenchmark and benchmark.keys == benchmark.protocols
    pairs = benchmark.pairs("test")
    assert [pairs.groups.count(group) for group in dict.fromkeys(pairs.groups)] == [1, 1, 3]
    seen: list[tuple[str, str]] = []

    def by_source(prompts, images):
        seen.extend((prompt, prompt.sources[0].image_key) for prompt in prompts)
        return torch.zeros(len(images))

    scoring = PairScoring(benchmark.readers()["test"], [CallableScorer(by_source, "own")])
    ((_, table),) = scoring.tables([range(5)])
    assert table.column("own_a").to_pylist() == [0.0] * 5
    assert {source for _, source in seen} == {"0.jpg", "1.jpg", "2.jpg"}
    (ranked_edits / "1.jpg").write_bytes(b"")
    ((_, table),) = PairScoring(benchmark.readers()["test"], [CallableScorer(by_source, "own")]).tables([range(5)])
    assert [problem is None for problem in table.column("problem_a").to_pylist()] == [True, False, True, True, True]


@pytest.fixture
def own_pairs(tmp_path) -> Path:
    for name, grey in {"dark": 10, "light": 200}.items():
        (tmp_path / f"{name}.jpg").write_bytes(encode(seed=grey))
    rows = [
        {"prompt": "a", "chosen": "light.jpg", "rejected": "dark.jpg", "votes": [9, 1], "confidence": 0.97},
        {"prompt": "a", "image_a": "dark.jpg", "image_b": "light.jpg", "label": 0.3},
        {"prompt": "b", "image_a": "dark.jpg", "image_b": "absent.jpg", "label": "tie"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_own_pairs_from_a_file_and_a_folder(own_pairs) -> None:
    for data in (own_pairs, own_pairs.parent):
        benchmark = recognise_benchmark(str(data))
        assert benchmark.protocols == ("pairs/strict", "pairs/soft")
        found = results(benchmark, scores(benchmark))
        assert {item["pairs"] for item in found.values()} == {2}
        assert [item["excluded"] for item in found.values()] == [{"missing file": 1}] * 2
    folder = own_pairs.parent / "folder"
    for side, name in {"chosen": "light.jpg", "rejected": "dark.jpg"}.items():
        (folder / side).mkdir(parents=True)
        shutil.copy(own_pairs.parent / name, folder / side / "1.jpg")
    (folder / "chosen" / "1.txt").write_text("a prompt")
    assert len(recognise_benchmark(str(folder)).readers()["all"]) == 1


def test_a_folder_without_the_file_of_a_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*test\.json"):
        sets.HPDv3Benchmark(str(tmp_path)).readers()


def test_temperatures_of_scorers_are_by_name_or_for_all_others() -> None:
    others = sets.PickAPicBenchmark("x", temperatures={"pickscore": 1.0, "others": None})
    assert [others.temperature(name) for name in ("pickscore", "my_run")] == [1.0, None]
