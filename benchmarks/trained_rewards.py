"""Train the tiny reward models that benchmarks score with, unless they were trained before."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FOLDER = Path("runs/trained_rewards")
LAYOUTS = {
    "lrm_tiny": "pickapic",
    "dina_lrm_tiny": "hpdv3",
    "dina_lrm_unet_tiny": "hpdv3",
    "pavrm_tiny": "pickapic",
    "drm_tiny": "pickapic",
    "layer_mix_tiny": "pickapic",
}
"""Shipped tiny recipes, and the layout of the pairs that each trains on."""


def trained_rewards(names: Sequence[str]) -> list[str]:
    """Return paths of rewards.

    Args:
        names: Paths of checkpoints or runs, which are returned as they are, or names of :data:`LAYOUTS`, with
            ``:SEED`` behind them for another seed than 0.
    """
    return [str(_trained(name)) if name.partition(":")[0] in LAYOUTS else name for name in names]


def _trained(name: str) -> Path:
    model, seed = f"{name}:0".split(":")[:2]
    folder = (FOLDER / f"{model}_seed{seed}").resolve()
    if not (folder / "trained").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "latentreward", "fit"),
            f"--config={CONFIGS}/model/{model}.yaml",
            f"--config={CONFIGS}/data/tinyworld_{LAYOUTS[model]}.yaml",
            f"--config={CONFIGS}/trainer/demo.yaml",
            f"--data.root={FOLDER.resolve() / 'data' / LAYOUTS[model]}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.val_check_interval=null",
            f"--seed_everything={seed}",
        ]
        with (folder / "run.log").open("a") as stream:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        (folder / "trained").touch()
    return folder / "reward.ckpt"
