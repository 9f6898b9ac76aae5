"""``latentreward benchmark`` from settings to a report, on the committed samples; also after SIGKILL."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from latentreward.apps.cli import main
from latentreward.apps.evaluation.benchmark.base import BenchmarkReport
from tests.alignment.rewards.stored import write_run
from tests.formats.conftest import COMMITTED
from tests.marks import rotated_after
from tests.processes import kill_after_parts

if TYPE_CHECKING:
    pass

EXPECTED = json.loads((COMMITTED / "EXPECTED.json").read_text())
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "benchmark"
MODULE = """
import os, time
import numpy as np, torch

def luminance(prompts, images):
    with open("calls.txt", "a") as file:
        file.writelines("x" for prompt in prompts)
    time.sleep(float(os.environ.get("SECONDS_PER_CALL", "0")))
    return torch.tensor([float(np.asarray(image, dtype=np.float64).mean()) for image in images])

def redness(prompts, images):
    return torch.tensor([float(np.asarray(image, dtype=np.float64)[..., 0].mean()) for image in images])
"""
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "imagereward": ("ImageRewardBenchmark", {}),
    "hpdv2": ("HPDv2Benchmark", {}),
    "hpdv3": ("HPDv3Benchmark", {}),
    "pickapic_v1": ("PickAPicBenchmark", {"temperatures": {"luminance": 8.0, "reward": None}}),
    "genai_bench": ("GenAIBenchTigerBenchmark", {}),
    "genai_bench_cmu": ("GenAIBenchCMUBenchmark", {}),
}
FILES = ("report.json", "report.md", "report.html")


def function(name: str) -> dict[str, Any]:
    settings = {"function": f"my_models.{name}", "name": name, "uses_prompt": False, "batch_size": 4}
    return {"class_path": "CallableScorer", "init_args": settings}


def sets(*names: str) -> list[dict[str, Any]]:
    return [
        {"class_path": SETS[name][0], "init_args": {"root": str(COMMITTED / name), **SETS[name][1]}} for name in names
    ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A latent reward of random weights, as training leaves one."""
    folder = tmp_path_factory.mktemp("reward", numbered=False)
    write_run(folder, "dina", "sd35")
    return str(folder / "reward.ckpt")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the user's module in it, as the current one."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return tmp_path


def run(*options: str, **settings: Any) -> dict[str, Any]:
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    main(["benchmark", "out", "--config=settings.yaml", *options])
    return json.loads(Path("out/report.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], *options: str, **settings: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*options, **settings)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentreward: error: ")]
    assert len(lines) == 1
    return lines[0]


def numbers(report: dict[str, Any], scorer: str) -> dict[tuple[str, str], float]:
    found = (one for one in report["protocols"] if one["scorer"] == scorer)
    return {(one["benchmark"].split()[-1], one["protocol"]): one["estimate"]["value"] for one in found}


def hpdv3_copy(folder: Path) -> Path:
    shutil.copytree(COMMITTED / "hpdv3", folder)
    return folder


@pytest.mark.slow
def test_every_protocol_on_the_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(benchmarks=sets(*SETS), scorers=[function("luminance")])
    found = numbers(report, "luminance")
    pickapic, hpdv2 = EXPECTED["pickapic_v1"]["luminance_scorer"], EXPECTED["hpdv2"]["luminance_scorer"]
    imagereward = EXPECTED["imagereward"]["luminance_scorer_before_removal"]
    expected = {
        ("test", "imagereward/micro"): imagereward["micro_acc"],
        ("test", "imagereward/macro"): imagereward["macro_acc_excl_all_tie"],
        ("test", "hpdv2/macro"): hpdv2["macro_inversion_score"],
        ("test", "hpdv2/micro"): hpdv2["micro_acc"],
        ("test", "hpdv3"): EXPECTED["hpdv3"]["luminance_scorer"]["acc"],
        ("test_unique", "pickapic/pickscore"): pickapic["pickscore_test_acc"],
        ("test_unique", "pickapic/lrm"): pickapic["lrm_style_test_acc"],
        ("test", "genai_bench_tiger/no_tie"): EXPECTED["genai_bench"]["luminance_scorer"]["acc_without_ties"],
        ("train", "genai_bench_cmu"): EXPECTED["genai_bench_cmu"]["luminance_scorer"]["acc"],
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    four = [found["test", key] for key in ("imagereward/micro", "hpdv2/micro", "hpdv3", "genai_bench_tiger/no_tie")]
    (average,) = report["averages"]
    assert average["scorer"] == "luminance"
    assert average["estimate"]["value"] == pytest.approx(sum(four) / 4)
    assert len(report["data"]) == 7
    assert report["published"]
    printed = capsys.readouterr().out
    assert "imagereward test  " in printed
    assert "90.0 [" in printed


@pytest.mark.slow
def test_a_latent_reward_beside_another_model(here: Path, reward: str) -> None:
    names = ("hpdv3", "genai_bench")
    report = run(f"--model={reward}", benchmarks=sets(*names), scorers=[function("luminance")], levels=[0.2, 0.7])
    assert set(report) == set(BenchmarkReport.__dataclass_fields__)
    assert set(numbers(report, "reward")) == set(numbers(report, "luminance"))
    splits = {"hpdv3 test", "genai_bench_tiger test"}
    levels = {(one["benchmark"], one["scorer"], one["sigma"]) for one in report["levels"]}
    assert levels == {(split, "reward", sigma) for split in splits for sigma in (0.2, 0.7)}
    assert all(0 < one["timestep"] < 1000 for one in report["levels"])
    for key in ("calibration", "agreement", "subgroups", "differences"):
        assert {one["benchmark"] for one in report[key]} == splits


def test_missing_and_broken_images_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hpdv3_copy(here / "hpdv3")
    rows = json.loads((root / "test.json").read_text())
    (root / rows[1]["path1"]).unlink()
    (root / rows[2]["path2"]).write_bytes(b"no image")
    report = run(data=str(root), scorers=[function("luminance"), function("redness")])
    (result, _) = report["protocols"]
    data = report["data"]["hpdv3 test"]
    assert sum(data["unreadable_images"].values()) == 2
    assert data["pairs_without_an_image"] == sum(result["excluded"].values()) == len(rows) - result["pairs"] >= 2
    assert "unknown image format" in Path("out/report.md").read_text()
    assert "hpdv3 test: 2 pairs left out: 1 missing file, 1 unknown image format" in capsys.readouterr().out


@pytest.mark.slow
def test_a_limit_is_said_loudly_and_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"benchmarks": sets("hpdv2"), "scorers": [function("luminance")]}
    report = run("--limit=10", **options)
    assert report["data"]["hpdv2 test"]["pairs"] == 10
    assert "only the first 10 pairs" in report["notes"][0]
    assert 'class="note"' in Path("out/report.html").read_text()
    assert "note: A first look" in capsys.readouterr().out
    calls = len(Path("calls.txt").read_text())
    whole = run(**options)
    assert whole["notes"] == []
    assert numbers(whole, "luminance")["test", "hpdv2/micro"] == pytest.approx(0.8518518518)
    table = pq.read_table("out/scores/hpdv2_test/luminance.parquet")
    images = {*table.column("image_a").to_pylist(), *table.column("image_b").to_pylist()}
    assert 0 < calls < len(Path("calls.txt").read_text()) == len(images)
    assert run("--limit=10", **options) == report


@pytest.mark.slow
def test_a_reward_that_was_trained_again_is_not_taken_for_the_old_one(
    here: Path, reward: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"benchmarks": sets("hpdv3"), "levels": []}
    shutil.copytree(Path(reward).parent, "mine")
    run(model="mine/reward.ckpt", **options)
    os.utime("mine/reward.ckpt", (5, 5))
    run(model="mine/reward.ckpt", **options)
    content = torch.load("mine/reward.ckpt", weights_only=True)
    content["state_dict"] = {name: value + 0.01 for name, value in content["state_dict"].items()}
    torch.save(content, "mine/reward.ckpt")
    line = refusal(capsys, model="mine/reward.ckpt", **options)
    assert "mine.parquet was begun with files" in line
    assert "delete" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "benchmarks: there are none"),
        ({"data": str(COMMITTED / "hpdv3")}, "scorers: there are none"),
        ({"data": "nowhere"}, "'nowhere'"),
        ({"data": str(COMMITTED / "diffusion_rm")}, "holds latents"),
        ({"benchmarks": sets("hpdv3", "hpdv3"), "scorers": [function("redness")]}, "two are named 'hpdv3'"),
        ({"data": str(COMMITTED / "hpdv3"), "model": "x", "levels": [0.5, 0.5]}, "holds a level twice"),
    ],
)
def test_wrong_settings_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert message in refusal(capsys, **settings)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_reports_the_same(here: Path) -> None:
    """SIGKILL of a real process between two parts of a table."""
    options = {"benchmarks": sets("hpdv2"), "scorers": [function("luminance")], "flush_every": 8}
    run(**options)
    expected = {name: Path("out", name).read_bytes() for name in FILES}
    everything = len(Path("calls.txt").read_text())
    Path("calls.txt").unlink()
    Path("out").rename("whole")

    parts = Path("out/scores/hpdv2_test/luminance.parquet.parts")
    slow = {"SECONDS_PER_CALL": "0.5"}
    kill_after_parts(["benchmark", "out", "--config=settings.yaml"], parts, environment=slow)
    assert not Path("out/report.json").exists()

    run(**options)
    assert {name: Path("out", name).read_bytes() for name in FILES} == expected
    assert everything <= len(Path("calls.txt").read_text()) <= everything + 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", rotated_after(1, sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "tiny"))
)
def test_shipped_configs_run_on_the_samples(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, sample in {
        "HPDV3_ROOT": "hpdv3",
        "HPDV2_ROOT": "hpdv2",
        "IMAGEREWARD_ROOT": "imagereward",
        "PICKAPIC_ROOT": "pickapic_v1",
        "GENAI_BENCH_ROOT": "genai_bench",
        "GENAI_BENCH_CMU_ROOT": "genai_bench_cmu",
    }.items():
        monkeypatch.setenv(variable, str(COMMITTED / sample))
    report = run(f"--config=configs/benchmark/{name}.yaml", scorers=[function("luminance")], limit=2)
    assert len(report["data"]) >= (7 if name == "all" else 1)
