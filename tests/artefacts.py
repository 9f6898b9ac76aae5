"""What today's program leaves on disk, one of each format: a cache, a run of a reward, its folder, a run of a policy.

They lie in ``artefact/`` beside the tests of their formats, which fail if a change of the program reads them otherwise.
After a change that is meant, ``python -m tests.artefacts`` writes them anew, from the root of the checkout.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from latentreward.apps.cli import main as latentreward
from latentreward.reward import RewardModel, ScoringNoise
from tests.diffusion.cache.writing import SQUARE, TALL, run_cache, write_data

TESTS = Path(__file__).parent
FOLDERS = {
    "cache": TESTS / "diffusion" / "cache" / "artefact",
    "reward": TESTS / "core" / "checkpoints" / "artefact",
    "published": TESTS / "reward" / "scoring" / "artefact",
    "policy": TESTS / "alignment" / "policies" / "artefact",
}
"""Name in the folder where they were made → place of the artefact."""
PROMPTS = ("a red circle", "two blue squares", "")
CACHED = ("--encoder.text=true", "--images_per_shard=2")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
LORA = {"rank": 1, "alpha": 2.0, "target_modules": ["to_q"]}
BACKBONE = {"tuning": "lora", "text_encoder_tuning": "frozen", "lora": LORA}


def trainer(folder: str, *callbacks: str) -> dict[str, Any]:
    """Settings of a run of two steps, within an epoch, whose checkpoint holds what trains."""
    save = {"class_path": "latentreward.callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": folder, "version": ""}},
        "callbacks": [save, *({"class_path": f"latentreward.callbacks.{name}"} for name in callbacks)],
    }


OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2, "eps": 1.0e-3}}
RUNS: dict[str, dict[str, Any]] = {
    "reward": {
        "model": {
            "class_path": "latentreward.reward.LRMModule",
            "init_args": {
                "backbone": {"class_path": "sd_tiny", "init_args": BACKBONE},
                "head": {"class_path": "CLIPProjectionHead", "init_args": {"embed_dim": 4}},
                "loss": {"class_path": "LRMLoss"},
                "optimizer": OPTIMIZER,
            },
        },
        "data": {
            "class_path": "latentreward.diffusion.CachedPreferenceDataModule",
            "init_args": {"train": {"cache": "cache"}, "batch_size": 2, "num_workers": 0},
        },
        "trainer": trainer("reward", "TrainableCheckpoint", "TrainableEMA"),
    },
    "policy": {
        "model": {
            "class_path": "latentreward.alignment.LPOModule",
            "init_args": {
                "policy": {"source": "sd_tiny", "lora": LORA},
                "reward": {"class_path": "LatentReward", "init_args": {"path": "reward"}},
                "sampling": {"num_inference_steps": 3, "height": 32, "width": 32},
                "candidates": {"num_candidates": 2},
                "selection": {"class_path": "QuantileThreshold", "init_args": {"quantile": 0.1}},
                "guidance_scale": 1.0,
                "optimizer": OPTIMIZER,
            },
        },
        "data": {
            "class_path": "latentreward.data.PromptDataModule",
            "init_args": {
                "prompts": "prompts.txt",
                "batch_size": 2,
                "prompts_per_rollout": 3,
                "batches_per_epoch": 4,
            },
        },
        "trainer": trainer("policy", "TrainableCheckpoint", "PolicyLoRA"),
    },
}


def scores_of(model: str) -> list[list[float]]:
    """Scores of two latents with two prompts at two timesteps, by the reward in a folder."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reward, levels = RewardModel.from_pretrained(model), ((1,), (401,))
    with torch.no_grad():
        return [
            reward.score_latents(PROMPTS[:2], latents, noise=ScoringNoise(timesteps=one)).tolist() for one in levels
        ]


def lay_out(folder: Path) -> None:
    """Copy the artefacts into a folder, under the names that they were made with, and write what else they need."""
    for name, place in FOLDERS.items():
        shutil.copytree(place, folder / name)
    write_inputs(folder)


def write_inputs(folder: Path) -> None:
    """Write the pairs of the cache, and the prompts of the policy."""
    write_data(folder / "data", pairs=5, sizes=(SQUARE, TALL))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\na cat\n")


def make() -> None:
    """Fill the current folder."""
    write_inputs(Path())
    run_cache(Path("cache"), Path("data"), *CACHED)
    for name, settings in RUNS.items():
        Path(f"{name}.yaml").write_text(json.dumps(settings))
        latentreward(["fit", f"--config={name}.yaml", *QUIET])
    pairs = (
        (number, word) for number in range(4) for word in ("cat", "dog", "cup", "hat", "key")
    )  # a calibration has 20
    rows = [{"image": f"data/images/{number}a.jpg", "prompt": word} for number, word in pairs]
    Path("reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    latentreward(["publish", "reward", "published", "--reference.images=reference.jsonl", "--licence=apache-2.0"])
    for name in ("reward", "published"):
        Path(name, "scores.json").write_text(json.dumps(scores_of(name)) + "\n")
    for name in RUNS:
        Path(name, "metrics.csv").unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)  # all paths that the artefacts hold are relative to it
        make()
        for name, place in FOLDERS.items():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(name, place)
    sys.exit(0)
