"""Every command with every family: cache, fit, score, publish, serve, benchmark, align, generate, export, evaluate."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from latentreward.apps.cli import main
from latentreward.tinyworld.writers import write_hpdv3
from tests.apps.serving.processes import forked_server
from tests.diffusion.families.twins import Twin, one_per_family
from tests.marks import release_after

SIZE = 32
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
PROMPTS = ["a large red circle on a white background", "two blue crosses"]
RED = {"class_path": "latentreward.reward.CallableScorer",
       "init_args": {"function": "tests.apps.evaluation.policy.toy_scorers.redness", "name": "red"}}  # fmt: skip


def run(command: str, settings: dict[str, Any], *options: str) -> None:
    """Run a command with settings from a file, as users do."""
    path = Path(f"{command}.yaml")
    path.write_text(yaml.safe_dump(settings))
    main([command, *options, f"--config={path}"])


def trainer(folder: str, *callbacks: Any) -> dict[str, Any]:
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "default_root_dir": folder, **QUIET}
    return {**settings, "callbacks": ["TrainableCheckpoint", "LastCheckpoint", *callbacks]}


def train_reward(twin: Twin) -> None:
    reader = {"class_path": "latentreward.data.HPDv3Reader", "init_args": {"root": "pairs", "split": "train"}}
    encoder = {"class_path": "PipelineEncoders", "init_args": {"source": twin.folder, "text": True, "batch_size": 4}}
    images = {"size": SIZE, "resize": "stretch"}
    settings = {"reader": reader, "encoder": encoder, "images": images, "dtype": "float32", "num_workers": 0}
    run("cache", {**settings, "device": "cpu"}, "cache")
    taps = [*range(1, twin.layers)]
    backbone = {"source": twin.folder, "visual_taps": taps, "text_taps": taps, "tuning": "lora"}
    head = {"class_path": "GatedQFormerHead", "init_args": {"num_queries": 2, "num_heads": 2}}
    arguments = {"backbone": {"class_path": twin.backbone, "init_args": backbone}, "head": head,
                 "loss": {"class_path": "ThurstoneLoss"}}  # fmt: skip
    data = {"train": {"cache": "cache"}, "batch_size": 4, "num_workers": 0}
    run("fit", {"model": {"class_path": "latentreward.reward.DiNaLRMModule", "init_args": arguments},
                "data": {"class_path": "latentreward.diffusion.CachedPreferenceDataModule", "init_args": data},
                "trainer": trainer("reward")})  # fmt: skip


def align(twin: Twin) -> None:
    sampling = {"num_inference_steps": 3, "height": SIZE, "width": SIZE}
    shown = {"prompts": PROMPTS, "every_n_steps": 1, "sampling": sampling}
    policy = {"source": twin.folder, "lora": {"rank": 2, "alpha": 4}, **twin.options}
    stored = {"class_path": "LatentReward", "init_args": {"path": "published", "base": twin.folder}}
    arguments = {"policy": policy, "reward": stored,
                 "sampling": sampling, "candidates": {"num_candidates": 2}, "selection": "QuantileThreshold",
                 "guidance_scale": twin.guidance}  # fmt: skip
    data = {"captions": 8, "batch_size": 2, "prompts_per_rollout": 2, "batches_per_epoch": 2}
    callbacks = [
        {"class_path": "SampleGrid", "init_args": shown},
        {"class_path": "HackingMonitor", "init_args": {**shown, "held_out": RED, "action": "warn"}},
        "PolicyLoRA",
        "EncodeOnce",
    ]
    run("fit", {"model": {"class_path": "latentreward.alignment.LPOModule", "init_args": arguments},
                "data": {"class_path": "latentreward.tinyworld.TinyWorldPromptDataModule", "init_args": data},
                "trainer": trainer("aligned", *callbacks)})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("twin", release_after(1, one_per_family()), ids=lambda twin: twin.family)
def test_every_command(twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hpdv3(Path("pairs"), {"train": 8, "test": 4})
    train_reward(twin)
    picture = next(Path("pairs").rglob("*.jpg"))
    Path("pictures").mkdir()
    Image.open(picture).save("pictures/a.png")
    Path("list.csv").write_text("image,prompt\npictures/a.png,a red circle\n")
    main(["publish", "reward", "published", "--licence=mit"])
    scores = []
    base = f"--base={twin.folder}"
    for model, options in (("reward", []), ("published", [base])):
        main(["score", "list.csv", f"{model}.csv", f"--model={model}", "--device=cpu", *options])
        (row,) = csv.DictReader(Path(f"{model}.csv").read_text().splitlines())
        scores.append(float(row["score"]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    with forked_server("serve", "published", base, "--port=0", "--device=cpu", cwd=tmp_path) as server:
        body = {"images": [base64.b64encode(Path("pictures/a.png").read_bytes()).decode()], "prompt": "a red circle"}
        reply = httpx.post(f"{server.address}/v1/score_images", json=body, timeout=300).json()
    assert reply["scores"] == pytest.approx([scores[0]], abs=1e-4)
    benchmark = {"class_path": "latentreward.apps.evaluation.benchmark.HPDv3Benchmark", "init_args": {"root": "pairs"}}
    run("benchmark", {"benchmarks": [benchmark]}, "benched", "--model=reward")
    assert json.loads(Path("benched/report.json").read_text())
    align(twin)
    assert list(Path("aligned").rglob("samples/*.png")) and list(Path("aligned").rglob("*.safetensors"))
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    sampling = [f"--sampling.{name}={value}" for name, value in
                {"num_inference_steps": 2, "height": SIZE, "width": SIZE}.items()]  # fmt: skip
    checkpoint = "aligned/checkpoints/last.ckpt" if Path("aligned/checkpoints").is_dir() else "aligned/last.ckpt"
    stored = {"class_path": "LatentReward", "init_args": {"path": "published", "base": twin.folder}}
    reward = f"--reward={json.dumps(stored)}"
    main(["generate", "prompts.txt", "made", f"--checkpoint={checkpoint}", *sampling, "--best_of=2", reward])
    assert Image.open(next(Path("made").glob("0*.png"))).size == (SIZE, SIZE)
    main(["export", checkpoint, "exported"])
    main(["export", checkpoint, "merged", "--format=merged"])
    against = [f"--against.pipeline.source={twin.folder}", "--against.lora=exported"]
    main(["evaluate-policy", "judged", "--prompts=prompts.txt", f"--policy.pipeline.source={twin.folder}", *against,
          f"--scorers=[{json.dumps(RED)}]", *sampling, "--device=cpu"])  # fmt: skip
    assert json.loads(Path("judged/report.json").read_text())
