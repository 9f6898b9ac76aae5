"""Benchmarks opened from folders: which protocols follow, what is missing, what pairs are told apart by."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from latentreward.apps.evaluation.benchmark import sets
from latentreward.apps.evaluation.benchmark.base import Benchmark, band, subgroup_columns
from latentreward.apps.evaluation.benchmark.evaluate import LOOKED_INTO
from latentreward.apps.evaluation.benchmark.protocols import PROTOCOLS, judge
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


def test_missing_images_are_left_out_and_counted(tmp_path) -> None:
    shutil.copytree(COMMITTED / "hpdv3", root := tmp_path / "hpdv3")
    whole = scores(recognise_benchmark(str(root)))["test"]
    row = json.loads((root / "test.json").read_text())[0]
    (root / row["path1"]).unlink()
    (root / row["path2"]).write_bytes(b"\x00 no image")
    benchmark = recognise_benchmark(str(root))
    pairs = scores(benchmark)["test"]
    lost = np.isnan(pairs.first + pairs.second)
    np.testing.assert_array_equal((pairs.first - pairs.second)[~lost], (whole.first - whole.second)[~lost])
    result = judge("hpdv3", pairs).result()
    assert sum(result["excluded"].values()) == lost.sum() >= 1
    assert set(result["excluded"]) <= {"missing file", "unknown image format"}
    with pytest.raises(InputError, match=r"no file .*test\.json"):
        sets.HPDv3Benchmark(str(tmp_path)).readers()


def test_splits_that_are_absent_leave_their_protocols_out(tmp_path) -> None:
    shutil.copytree(COMMITTED / "pickapic_v1", root := tmp_path / "pickapic")
    next((root / "data").glob("validation_unique*")).unlink()
    assert recognise_benchmark(str(root)).protocols == ("pickapic/lrm", "pickapic/strict")
    shutil.copytree(COMMITTED / "genai_bench", root := tmp_path / "genai")
    (root / "image_generation").chmod(0o755)
    next((root / "image_generation").glob("test_v1*")).unlink()
    assert recognise_benchmark(str(root)).splits == ("test",)


def test_configs_name_benchmarks_by_class(own_pairs) -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--benchmarks", type=list[Benchmark])
    config = own_pairs.parent / "benchmarks.yaml"
    reader = {"class_path": "JSONLPairReader", "init_args": {"file": str(own_pairs), "on_error": "skip"}}
    listed = [
        {"class_path": "HPDv3Benchmark", "init_args": {"root": str(COMMITTED / "hpdv3")}},
        {
            "class_path": "PickAPicBenchmark",
            "init_args": {"root": str(COMMITTED / "pickapic_v1"), "temperatures": {"cosine": 0.01, "dina": None}},
        },
        {"class_path": "PairsBenchmark", "init_args": {"reader": reader, "name": "mine"}},
    ]
    config.write_text(yaml.safe_dump({"benchmarks": listed}))
    hpdv3, pickapic, pairs = parser.instantiate(parser.parse_args([f"--config={config}"])).benchmarks
    assert (hpdv3.name, pairs.name, len(pairs.readers()["train"])) == ("hpdv3", "mine", 3)
    assert [pickapic.temperature(name) for name in ("cosine", "dina", "pickscore")] == [0.01, None, 1.0]
    others = sets.PickAPicBenchmark("x", temperatures={"pickscore": 1.0, "others": None})
    assert [others.temperature(name) for name in ("pickscore", "my_run")] == [1.0, None]


def test_pairs_are_told_apart_by_what_is_published() -> None:
    hpdv3 = sets.HPDv3Benchmark(str(COMMITTED / "hpdv3"), "all")
    columns = hpdv3.pairs("all").columns
    assert {"models", "model", "prompt length", "vote share", "confidence"} <= set(columns)
    for models, model in zip(columns["models"], columns["model"], strict=True):
        assert models is None or sorted(set(models.split(" against "))) == model.split("\n")
    cmu = recognise_benchmark(str(COMMITTED / "genai_bench_cmu")).pairs("train").columns["skill"]
    assert set(cmu) == {"basic\nattribute\nscene", "advanced\nattribute\nscene\ncounting"}
    tiger = recognise_benchmark(str(COMMITTED / "genai_bench")).pairs("test").columns["vote"]
    assert sorted(tiger) == sorted(["leftvote"] * 2 + ["rightvote"] * 2 + ["tievote", "bothbad_vote"])


def test_styles_of_hpdv2_come_from_its_lists_of_prompts(tmp_path) -> None:
    shutil.copytree(COMMITTED / "hpdv2", root := tmp_path / "hpdv2", copy_function=shutil.copyfile)
    prompt = json.loads((root / "test.json").read_text())[0]["prompt"]
    (root / "benchmark").chmod(0o755)
    (root / "benchmark" / "anime.json").write_text(json.dumps([prompt, 3]))
    (root / "benchmark" / "photo.json").write_text("no list")
    (root / "benchmark" / "paintings.json").write_text("[" * 100_000)
    assert set(recognise_benchmark(str(root)).pairs("test").columns["style"]) == {"anime", None}


def test_bands_by_hand() -> None:
    bands = {0.0: "low", 0.5: "middle", 0.9: "high"}
    assert [band(value, bands) for value in (-1, 0, 0.49, 0.5, 0.89, 0.9, 5)] == ["low"] * 3 + ["middle"] * 2 + [
        "high"
    ] * 2
    facts = {"votes_a": [9, 2, 0, None, 5], "votes_b": [1, 8, 0, 3, 5]}
    columns = subgroup_columns(["", "one", "a b c d e f", "x", "y"], np.array([1, 0, 1, 1, 0.5]), facts)
    assert columns["vote share"] == ("0.9 to 1", "0.8 to 0.9", None, None, None)
    assert columns["prompt length"][:3] == ("no words", "1 to 5 words", "6 to 15 words")
    assert set(columns) == {"vote share", "prompt length"}
