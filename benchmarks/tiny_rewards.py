"""Measure the accuracies of the tiny reward models over several seeds, beside targets, through the command line alone.

Each model is trained by ``latentreward fit`` and scores held-out pairs by ``latentreward predict``: pairs rendered by
the tiny world (DRAWN), and pairs sampled by the two tiny generators (GEN), a kind that no model was trained on.
Accuracy is the share of pairs ranked like the noiseless utility, among pairs whose utilities differ by more than 0.3.

    python benchmarks/tiny_rewards.py --seeds 3 --jobs 2
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from pyarrow import parquet

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LEAST_GAP = 0.3
HELD_OUT = 3000


@dataclass(frozen=True)
class Experiment:
    """A configuration and the accuracies to measure: (set of pairs, column of the noise level, noise level) each."""

    name: str
    model: str
    layout: str
    options: tuple[str, ...]
    columns: tuple[tuple[str, str, float], ...]


LRM = (("DRAWN", "timestep", 1.0), ("DRAWN", "timestep", 251.0), ("DRAWN", "timestep", 801.0), ("GEN", "timestep", 1.0))
DINA = (("DRAWN", "sigma", 0.2), ("DRAWN", "sigma", 0.5), ("DRAWN", "sigma", 0.8), ("GEN", "sigma", 0.2))
EXPERIMENTS = (
    Experiment("LRM", "lrm_tiny", "pickapic", (), LRM),
    Experiment("LRM, random backbone", "lrm_tiny", "pickapic", ("--model.backbone.pretrained=false",), LRM),
    Experiment("DiNa-LRM", "dina_lrm_tiny", "hpdv3", (), DINA),
    Experiment(
        "DiNa-LRM, random backbone",
        "dina_lrm_tiny",
        "hpdv3",
        ("--config={model: {init_args: {backbone: {init_args: {pretrained: false, tuning: full, lora: null}}}}}",),
        DINA,
    ),
    Experiment("DiNa head on U-Net", "dina_lrm_unet_tiny", "hpdv3", (), DINA),
    Experiment("LRM head on DiT", "lrm_dit_tiny", "pickapic", (), DINA),
)
TARGETS = (
    ("LRM at t = 1", "LRM", 0, None, 0.76),
    ("LRM at t = 801", "LRM", 2, None, 0.66),
    ("LRM on GEN", "LRM", 3, None, 0.65),
    ("DiNa-LRM at σ = 0.2", "DiNa-LRM", 0, None, 0.82),
    ("DiNa-LRM at σ = 0.5", "DiNa-LRM", 1, None, 0.80),
    ("DiNa-LRM pretrained − random at σ = 0.2", "DiNa-LRM", 0, "DiNa-LRM, random backbone", 0.05),
    ("LRM pretrained − random on GEN", "LRM", 3, "LRM, random backbone", 0.03),
    ("DiNa head on U-Net at σ = 0.2", "DiNa head on U-Net", 0, None, 0.65),
    ("LRM head on DiT at σ = 0.2", "LRM head on DiT", 0, None, 0.65),
)


def latentreward(log: Path, *arguments: str) -> None:
    """Run ``latentreward`` in a process with one thread, and append its output to ``log``."""
    command = [sys.executable, "-m", "latentreward", *arguments]
    with log.open("a") as stream:
        stream.write("$ " + " ".join(command) + "\n")
        stream.flush()
        subprocess.run(
            command, check=True, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def accuracy(scores: Path, oracle: Path, column: str, level: float) -> float:
    """Compute the share of clearly different pairs ranked like their utilities, at the level nearest ``level``."""
    table = parquet.read_table(scores).to_pylist()
    rows = parquet.read_table(oracle).to_pylist()
    utilities = {row["pair_id"]: {row["key_a"]: row["utility_a"], row["key_b"]: row["utility_b"]} for row in rows}
    nearest = min({row[column] for row in table}, key=lambda value: abs(value - level))
    hits = []
    for row in table:
        if row[column] == nearest:
            utility = utilities[row["pair_id"]]
            gap = utility[row["chosen_key"]] - utility[row["rejected_key"]]
            if abs(gap) > LEAST_GAP:
                hits.append(row["margin"] * gap > 0)
    return mean(hits)


def run(experiment: Experiment, seed: int, output: Path) -> list[float]:
    """Train a model, score both sets of pairs, and return one accuracy per column; finished runs are reused."""
    folder = output / f"{experiment.model}{'_random' if 'random' in experiment.name else ''}_seed{seed}"
    result = folder / "accuracies.json"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    log, data = folder / "run.log", output / "data"
    model = f"--config={CONFIGS}/model/{experiment.model}.yaml"
    drawn = (
        f"--config={CONFIGS}/data/tinyworld_{experiment.layout}.yaml",
        f"--data.root={data / experiment.layout}",
        f"--data.val_pairs={HELD_OUT}",
    )
    common = ("--config", f"{CONFIGS}/trainer/demo.yaml", f"--trainer.default_root_dir={folder}", *experiment.options)
    common = (*common, f"--seed_everything={seed}")
    if not (folder / "trained").exists():
        latentreward(log, "fit", model, *drawn, *common, "--trainer.val_check_interval=null")
        (folder / "trained").touch()
    generated = ("--config", str(output / "generated.yaml"))
    for name, pairs in (("DRAWN", drawn), ("GEN", generated)):
        if not (folder / name / "scores_rank0.parquet").is_file():
            checkpoint, scores = f"--ckpt_path={folder / 'reward.ckpt'}", f"--predictions.output_dir={folder / name}"
            latentreward(log, "predict", model, *pairs, *common, checkpoint, scores)
    oracles = {"DRAWN": data / experiment.layout, "GEN": data / "generated"}
    values = [
        accuracy(folder / name / "scores_rank0.parquet", oracles[name] / "oracle.parquet", column, level)
        for name, column, level in experiment.columns
    ]
    result.write_text(json.dumps(values))
    return values


def markdown(results: dict[str, list[list[float]]]) -> Iterable[str]:
    """Yield the lines of tables with means and standard deviations over seeds, and of the table of targets."""
    for experiment in EXPERIMENTS:
        if experiment.name not in results:
            continue
        heads = [f"{name} {column} {level:g}" for name, column, level in experiment.columns]
        yield f"\n| {experiment.name} | " + " | ".join(heads) + " |"
        yield "|---" * (len(heads) + 1) + "|"
        for seed, values in enumerate(results[experiment.name]):
            yield f"| seed {seed} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
        cells = [
            f"{mean(v):.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for v in zip(*results[experiment.name], strict=True)
        ]
        yield "| mean ± sd | " + " | ".join(cells) + " |"
    yield "\n| target | at least | reached | |\n|---|---|---|---|"
    for title, name, column, control, target in TARGETS:
        if name in results and (control is None or control in results):
            value = mean(values[column] for values in results[name])
            value -= 0 if control is None else mean(values[column] for values in results[control])
            yield f"| {title} | {target:.2f} | {value:.3f} | {'yes' if value >= target else '**no**'} |"


def main() -> None:
    """Run the chosen experiments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_rewards"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--only", nargs="*", help="names of experiments, e.g. LRM DiNa-LRM; the default is all")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    prepare(output)
    chosen = [experiment for experiment in EXPERIMENTS if not arguments.only or experiment.name in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {e.name: [pool.submit(run, e, seed, output) for seed in range(arguments.seeds)] for e in chosen}
        results = {name: [job.result() for job in seeds] for name, seeds in jobs.items()}
    print("\n".join(markdown(results)))


def prepare(output: Path) -> None:
    """Write the sets of pairs that all runs share, and the data config of GEN."""
    from latentreward.tinyworld.writers import write_generated, write_hpdv3, write_pickapic

    write_pickapic(output / "data" / "pickapic", {"train": 6000, "validation": HELD_OUT})
    write_hpdv3(output / "data" / "hpdv3", {"train": 6000, "test": HELD_OUT})
    folder = write_generated(output / "data" / "generated")
    reader = {"class_path": "latentreward.data.PickAPicReader", "init_args": {"source": str(folder), "split": "test"}}
    settings = {"size": 32, "predict": reader, "num_workers": 0, "batch_size": 64}
    data = {"data": {"class_path": "latentreward.data.PreferenceDataModule", "init_args": settings}}
    (output / "generated.yaml").write_text(json.dumps(data))


if __name__ == "__main__":
    main()
