"""evaluate-policy from prompts or folders to pictures, scores and reports."""

import csv
import importlib
import inspect
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from latentreward.alignment import PolicySource, TrainedLoRA
from latentreward.apps.cli import main
from latentreward.apps.generation.trained_policy import TrainedPolicy
from tests.alignment.policies.alignment import perturbed
from tests.apps.evaluation.policy import toy_scorers
from tests.marks import rotated_after
from tests.processes import start

FORMATS = Path(__file__).resolve().parents[2] / "formats" / "data"
HOSTILE = 'a «"/\\: <script>alert(1)</script> | `x` ü'
PROMPTS = ["a large red circle on a white background", "two blue crosses on a gray background", HOSTILE]
FAST = ["--sampling.num_inference_steps=2", "--guidance_scale=1", "--device=cpu"]
SD_TINY = "--policy.pipeline=sd_tiny"
Run = Callable[..., dict[str, Any]]


def toy(function: str = "redness", name: str = "red") -> str:
    arguments = {"function": f"tests.apps.evaluation.policy.toy_scorers.{function}", "name": name}
    return json.dumps({"class_path": "latentreward.reward.CallableScorer", "init_args": arguments})


RED = f"--scorers=[{toy()}]"


@pytest.fixture
def evaluate(tmp_path: Path, prompts: Path) -> Run:
    def run(*options: str, folder: str = "out", file: Path | None = prompts) -> dict[str, Any]:
        given = [] if file is None else [f"--prompts={file}"]
        scorers = [] if any(option.startswith("--scorers") for option in options) else [RED]
        main(["evaluate-policy", str(tmp_path / folder), *given, *FAST, *scorers, *options])
        return json.loads((tmp_path / folder / "report.json").read_text())

    return run


@pytest.fixture
def refused(evaluate: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*options: str, **where: Any) -> str:
        with pytest.raises(SystemExit) as stop:
            evaluate(*options, **where)
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("latentreward: error: ")
        return error

    return run


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "exported"
    TrainedLoRA.of_policy(perturbed(PolicySource("sd_tiny").load())).write_diffusers(folder)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.mark.slow
def test_two_policies_from_prompts_to_reports(evaluate: Run, lora: Path, tmp_path: Path) -> None:
    report = evaluate(
        SD_TINY, f"--policy.lora={lora}", "--policy.name=tuned", "--against.pipeline=sd_tiny", "--against.name=base",
        "--images_per_prompt=2",
    )  # fmt: skip
    rows = table(tmp_path / "out")
    assert len(rows) == 2 * 3 * 2
    assert [row["prompt"] for row in rows[:6]] == [prompt for prompt in PROMPTS for _ in range(2)]
    for slot, name in (("policy", "tuned"), ("against", "base")):
        for row in [row for row in rows if row["policy"] == name]:
            levels = np.asarray(Image.open(tmp_path / "out" / "pictures" / slot / row["file"]))
            assert float(row["red"]) == pytest.approx(levels[..., 0].mean(), rel=1e-6)
    tuned, base = (np.array([float(row["red"]) for row in rows if row["policy"] == name]) for name in ("tuned", "base"))
    (compared,) = report["comparisons"]
    assert compared["difference"]["value"] == pytest.approx((tuned - base).mean())
    assert compared["win_rate"]["value"] == pytest.approx((tuned > base).mean())
    assert compared["difference"]["low"] <= compared["difference"]["value"] <= compared["difference"]["high"]
    assert [score["mean"]["value"] for score in report["scores"]] == pytest.approx([tuned.mean(), base.mean()])
    assert compared["difference"]["groups"] == 3
    for name in ("report.md", "report.html"):
        assert (tmp_path / "out" / name).read_text().count("] (3 groups)") >= 4, name
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text()
    assert HOSTILE not in (tmp_path / "out" / "report.html").read_text()
    assert "| red | " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_nothing_is_done_twice(
    evaluate: Run, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluate(SD_TINY)
    monkeypatch.setattr(TrainedPolicy, "load", lambda *_: pytest.fail("loaded"))
    toy_scorers.CALLS.clear()
    assert evaluate(SD_TINY) == before
    assert toy_scorers.CALLS == []
    kept = tmp_path / "out" / "scores" / "policy" / "red.jsonl"
    kept.write_text("rubbish")
    assert "red.jsonl is damaged (" in refused(SD_TINY)
    assert kept.read_text() == "rubbish"
    kept.unlink()
    assert evaluate(SD_TINY) == before
    assert toy_scorers.CALLS == [3]
    assert "brightness" in {
        score["score"] for score in evaluate(SD_TINY, f"--scorers=[{toy(name='brightness')}]")["scores"]
    }


@pytest.mark.slow
def test_ctrl_c_keeps_pictures_and_scores(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluate(SD_TINY, folder="whole")
    with monkeypatch.context() as patch:
        patch.setattr(toy_scorers, "redness", lambda *_: signal.raise_signal(signal.SIGINT))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            evaluate(SD_TINY)
    assert stop.value.code == 130
    kept = f"what is done is kept in {tmp_path / 'out'}: the same command goes on there"
    assert f"latentreward: stopped by Ctrl-C; {kept}\n" in capsys.readouterr().err
    monkeypatch.setattr(TrainedPolicy, "load", lambda *_: pytest.fail("loaded"))
    assert evaluate(SD_TINY)["scores"] == whole["scores"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(evaluate: Run, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("\n".join(f"a red circle number {number}" for number in range(12)))
    options = [SD_TINY, RED, f"--prompts={prompts}", *FAST, "--sampling.num_inference_steps=10", "--batch_size=1"]
    root = Path(__file__).resolve().parents[3]
    process = start(["evaluate-policy", str(tmp_path / "killed"), *options], cwd=root)
    folder = tmp_path / "killed" / "pictures" / "policy"
    deadline = time.monotonic() + 600
    while len(pictures(folder)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    assert 4 <= len(there) < 12
    noted = {row.split(",")[0] for row in (folder / "images.csv").read_text().splitlines()[1:]}
    for name in ("killed", "whole"):
        evaluate(SD_TINY, "--sampling.num_inference_steps=10", "--batch_size=1", folder=name)
    assert pictures(folder) == pictures(tmp_path / "whole" / "pictures" / "policy")
    assert all((folder / name).stat().st_mtime_ns == there[name] for name in noted)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


@pytest.mark.slow
def test_a_folder_from_elsewhere_is_judged_by_its_table(evaluate: Run, prompts: Path, tmp_path: Path) -> None:
    main(["generate", str(prompts), str(tmp_path / "made"), "--policy.source=sd_tiny", "--images_per_prompt=2", *FAST])
    report = evaluate(f"--policy.images={tmp_path / 'made'}", SD_TINY.replace("policy", "against"), file=None)
    (compared,) = report["comparisons"]
    assert (compared["ties"], compared["win_rate"]["value"]) == (6, 0.5)
    assert "whether their noise was equal is unknown" in report["notes"][0]
    alone = evaluate(f"--policy.images={tmp_path / 'made'}", "--images_per_prompt=1", folder="alone")
    assert alone["scores"][0]["pictures"] == 3
    assert alone["notes"] == ["policy has 3 more pictures, of other prompts or numbers; they are ignored."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "policy"),
        ([SD_TINY, "--scorers=[]"], "there is no scorer"),
        ([SD_TINY, f"--scorers=[{toy()}, {toy()}]"], "'red'"),
        ([SD_TINY, f"--scorers=[{toy('not_a_number', 'odd')}]"], "scorer 'odd' returned nan"),
        ([SD_TINY, "--policy.images=."], "images and pipeline"),
        ([SD_TINY, "--policy.name=x", "--against.pipeline=sd_tiny", "--against.name=x"], "are called 'x'"),
        ([SD_TINY, "--policy.guidance_scale=0.5"], "guidance_scale=0.5"),
        ([SD_TINY, "--policy.lora=gone"], "lora: gone"),
        (["--policy.images=gone"], "gone/images.csv"),
        ([SD_TINY, "--images_per_prompt=0"], "images_per_prompt: 0"),
        ([SD_TINY, "--prompts=nothing*.txt"], "nothing*.txt"),
        ([SD_TINY, "--prompts=null"], "set prompts"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(refused: Callable[..., str], options: list[str], message: str) -> None:
    assert message in refused(*options)


PRESETS = Path(__file__).resolve().parents[3] / "configs" / "evaluate"


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", rotated_after(2, sorted(path.name for path in PRESETS.glob("*.yaml") if "_published" not in path.name))
)
def test_every_preset_runs(preset: str, evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in (("prompts/evaluation_metadata.jsonl", "geneval_metadata.jsonl"),):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((FORMATS / "prompts" / source).read_bytes())
    (tmp_path / "examples" / "dataset").mkdir(parents=True)
    (tmp_path / "examples" / "dataset" / "color_val.txt").write_text("a violet jar and a silver lamp\n")
    (captions,) = (FORMATS / "pickapic_v1" / "data").glob("validation_unique*")
    values = {
        "PICKAPIC_VALIDATION": captions,
        "PARTI_PROMPTS": FORMATS / "prompts" / "PartiPrompts.tsv",
        "HPDV2_ROOT": FORMATS / "hpdv2",
        "SD15_PATH": "sd_tiny",
        "SDXL_PATH": "sd_tiny",
        "AESTHETIC_WEIGHTS": "unused",
        **dict.fromkeys(("GENEVAL_ROOT", "GENEVAL_MODELS", "T2I_COMPBENCH_ROOT"), tmp_path),
        **dict.fromkeys(("GENEVAL_PYTHON", "T2I_COMPBENCH_PYTHON"), sys.executable),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    native = ["--sampling.height=null", "--sampling.width=null"]
    few = ["--num_prompts=2", "--images_per_prompt=2", "--sampling.num_inference_steps=4"]
    policy = [] if preset == "tiny.yaml" else [SD_TINY]
    report = evaluate(f"--config={PRESETS / preset}", *policy, RED, *native, *few, file=None)
    assert all(score["mean"]["value"] > 0 for score in report["scores"])
    for scorer in yaml.safe_load((PRESETS / preset).read_text())["scorers"]:
        room, _, kind = scorer["class_path"].rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(room), kind))
        signature.bind_partial(**scorer.get("init_args", {}))
