"""Compare two versions of the program bit by bit on this machine; prints a Markdown table.

Usage: ``python benchmarks/bit_equal.py OLD/.venv/bin/python NEW/.venv/bin/python``: the Python interpreters of two
checkouts, each with its own editable installation and equal versions of torch and all dependencies. Takes about two
minutes on one core; the exit status is 1 if anything differs. Both versions make the files of their own
``bit_equal_runs.py`` (LRM, DiNa-LRM from a cache, LPO, published folders), resume its interrupted runs, and train,
evaluate and score with the shipped tiny configs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("lrm", "dina", "lpo")
"""Runs of ``bit_equal_runs.py``."""
TINY = {
    "lrm_tiny": "pickapic",
    "dina_lrm_tiny": "hpdv3",
    "dina_lrm_unet_tiny": "hpdv3",
    "lrm_dit_tiny": "pickapic",
    "spm_tiny": "pickapic",
}
"""Name of a shipped model config → layout of the pairs for its training."""
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SHORT = ("--data.train_pairs=24", "--data.val_pairs=12", "--data.batch_size=8", "--trainer.max_steps=3")
SCORING = {"lrm_tiny": "{timesteps: [1, 401]}", "dina_lrm_tiny": "{sigmas: [0.2, 0.5, 0.7]}"}
"""Name of a model config → noise of the ensemble by which ``score`` scores."""


def run(folder: Path) -> None:
    """Make all files to compare in ``folder``, with the version that this interpreter imports."""
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    os.chdir(folder)
    from benchmarks.bit_equal_runs import make
    from latentreward.apps.cli import main as latentreward

    make()
    for name in RUNS:
        resumed = ("--trainer.default_root_dir=resumed", f"--trainer.logger.name=resumed/{name}", *QUIET)
        checkpoint = f"--ckpt_path={name}/checkpoints/last-step.ckpt"
        latentreward(["fit", f"--config={name}/config.yaml", checkpoint, *resumed])
    for model, layout in TINY.items():
        files = (f"model/{model}", f"data/tinyworld_{layout}", "trainer/cpu")
        place = (f"--data.root=tiny/{layout}", "--trainer.logger.save_dir=tiny", f"--trainer.logger.name={model}")
        latentreward(["fit", *(f"--config=configs/{file}.yaml" for file in files), *place, *SHORT, *QUIET])
        trained = (f"--config=tiny/{model}/config.yaml", f"--ckpt_path=tiny/{model}/checkpoints/last.ckpt")
        latentreward(["predict", *trained, f"--predictions.output_dir=tiny/{model}/predicted"])
    for model, noise in SCORING.items():
        latentreward(
            ["score", "images/list.jsonl", f"tiny/{model}.parquet", f"--model=tiny/{model}", f"--noise={noise}"]
        )


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors and floats of nested containers, each with its path in the containers."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors(part, f"{name}/{number}")
    elif isinstance(value, float):
        yield name, torch.tensor(value, dtype=torch.float64)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file: weights, optimiser state and average of a checkpoint, or scores of a table."""
    if path.suffix == ".ckpt":
        content = torch.load(path, weights_only=True)
        kept = {part: content.get(part) for part in ("state_dict", "optimizer_states", "global_step")}
        return dict(tensors({**kept, "average": content["callbacks"].get("TrainableEMA")}))
    if path.suffix == ".parquet":
        return dict(tensors(parquet.read_table(path).to_pydict()))
    return load_file(path)


def compare(old: Path, new: Path) -> bool:
    """Print one line for each file with numbers, and return whether all numbers are equal."""
    patterns = ("*.ckpt", "*.safetensors", "predicted/*.parquet", "tiny/*.parquet")
    files = {path.relative_to(side) for side in (old, new) for name in patterns for path in side.rglob(name)}
    print("| file | tensors | equal | largest difference |\n|---|---|---|---|")
    same = True
    for file in sorted(files):
        if not ((old / file).is_file() and (new / file).is_file()):
            print(f"| {file} | | only in {'old' if (old / file).is_file() else 'new'} | |")
            same = False
            continue
        first, second = read(old / file), read(new / file)
        equal = [name for name in first.keys() & second.keys() if torch.equal(first[name], second[name])]
        number = len(first.keys() | second.keys())
        differences = [
            (first[name].double() - second[name].double()).abs().max().item()
            for name in first.keys() & second.keys()
            if first[name].shape == second[name].shape and first[name].numel()
        ]
        same = same and len(equal) == number
        print(f"| {file} | {number} | {len(equal)} | {max(differences, default=0.0):.2g} |")
    scores = [(side / "scores.json").read_bytes() for side in (old, new)]
    print(f"| scores.json | | {'equal' if scores[0] == scores[1] else 'different'} | |")
    return same and scores[0] == scores[1]


def main() -> None:
    """Run both versions and compare their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="*", help="interpreters of the old and of the new version")
    parser.add_argument("--run", type=Path, help="only make what is compared, in this folder, by this interpreter")
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    if len(options.python) != 2:
        parser.error("give two interpreters")
    with tempfile.TemporaryDirectory(prefix="bit_equal_") as folder:
        sides = [Path(folder, name) for name in ("old", "new")]
        for python, side in zip(options.python, sides, strict=True):
            side.mkdir()
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            script = Path(python).parents[2] / "benchmarks" / "bit_equal.py"  # which knows its version's names
            done = subprocess.run(
                [python, script, f"--run={side}"], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{python}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        sys.exit(0 if compare(*sides) else 1)


if __name__ == "__main__":
    main()
