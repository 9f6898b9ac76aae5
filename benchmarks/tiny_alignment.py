"""Measure the effect of alignment on the tiny generators: several seeds, controls, methods at equal processor time.

Every run is started by ``latentreward fit`` with the shipped configs/align/*_tiny.yaml. Then diffusers samples one
picture for each of 192 held-out captions with the exported LoRA, and the tiny world's judge scores the pictures; the
judge is never a reward. Differences are paired by caption and noise. The first interval resamples seeds and captions;
the second is Student's t interval over the means of the seeds.

    python benchmarks/tiny_alignment.py --seeds 3 --jobs 2
    python benchmarks/tiny_alignment.py --only "LPO" --seeds 1
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import table

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Run:
    """Settings of an experiment, which is run once per seed.

    Attributes:
        name: Name in the table.
        group: Table that the experiment belongs to.
        config: Name of a config in configs/align.
        guidance: Guidance scale in training and in the judged samples.
        options: Further arguments. ``{seed}`` stands for the seed, ``{lrm}`` and ``{dina}`` for the rewards of that
            seed, ``{pairs}`` for the folder of pairs.
        pipeline: Pipeline to align.
    """

    name: str
    group: str
    config: str
    guidance: float
    options: tuple[str, ...] = ()
    pipeline: str = "sd_tiny"


LRM = ("--model.reward.path={lrm}",)
NOISE = ("--model.reward=RandomReward", "--model.reward.seed={seed}")
READOUT = (*NOISE, "--model.reward.kind=readout", "--model.selection=QuantileThreshold")
OFFLINE = ("--data.root={pairs}", "--trainer.limit_val_batches=0")
EQUAL = 40.0
"""Processor time of each run in the comparison of methods, in seconds."""
BUDGET = (
    "--trainer.callbacks+=latentreward.reproduction.process_time.ProcessTimeBudget",
    f"--trainer.callbacks.seconds={EQUAL:g}",
    "--trainer.max_steps=-1",
)
RUNS = (
    Run("LPO, guidance 1", "LPO", "lpo_tiny", 1.0, LRM),
    Run("LPO, guidance 3", "LPO", "lpo_tiny", 3.0, LRM),
    Run("random numbers as reward, guidance 1", "LPO", "lpo_tiny", 1.0, NOISE),
    Run("random numbers as reward, guidance 3", "LPO", "lpo_tiny", 3.0, NOISE),
    Run("random function as reward, guidance 1", "LPO", "lpo_tiny", 1.0, READOUT),
    Run("LPO", "equal time", "lpo_tiny", 1.0, (*LRM, *BUDGET)),
    Run("SPO", "equal time", "spo_tiny", 1.0, BUDGET),
    Run("Diffusion-DPO", "equal time", "diffusion_dpo_tiny", 1.0, (*OFFLINE, *BUDGET)),
    Run("ReFL", "equal time", "refl_tiny", 1.0, (*LRM, *BUDGET)),
    Run("step-wise GRPO", "equal time", "grpo_stepwise_tiny", 1.0, (*LRM, *BUDGET)),
    Run("LPO on SD3.5, DiNa-LRM", "SD3.5", "lpo_sd35_tiny", 1.0, ("--model.reward.path={dina}",), "sd35_tiny"),
    Run(
        "step-wise GRPO on SD3.5, DiNa-LRM",
        "SD3.5",
        "grpo_stepwise_sd35_tiny",
        1.0,
        ("--model.reward.path={dina}",),
        "sd35_tiny",
    ),
)


def latentreward(log: Path, *arguments: str) -> None:
    """Run ``latentreward`` in a process with one thread, and append its output to ``log``."""
    command = [sys.executable, "-m", "latentreward", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write("$ " + " ".join(command) + "\n")
        stream.flush()
        subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def train_reward(output: Path, model: str, layout: str, seed: int) -> Path:
    """Train a tiny reward model, unless it has been trained before; return its checkpoint."""
    folder = output / f"{model}_seed{seed}"
    if not (folder / "trained").exists():
        latentreward(
            folder / "run.log",
            "fit",
            f"--config={CONFIGS}/model/{model}.yaml",
            f"--config={CONFIGS}/data/tinyworld_{layout}.yaml",
            f"--config={CONFIGS}/trainer/demo.yaml",
            f"--data.root={output / 'data' / layout}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.val_check_interval=null",
            f"--seed_everything={seed}",
        )
        (folder / "trained").touch()
    return folder / "reward.ckpt"


def judge(pipeline: str, lora: Path | None, guidance: float, result: Path) -> dict[str, Any]:
    """Sample and judge a policy's pictures in a new process; keep the utilities in the file ``result``."""
    if not result.is_file():
        code = (
            "import json, sys, torch; torch.set_num_threads(1); from pathlib import Path\n"
            "from latentreward.tinyworld.comparison import judge_policy\n"
            "pipeline, lora, guidance, result = sys.argv[1:]\n"
            "judged = judge_policy(pipeline, Path(lora) if lora else None, float(guidance))\n"
            "Path(result).write_text(json.dumps({'utility': judged.utility.tolist(), 'verdict': judged.verdict}))\n"
        )
        result.parent.mkdir(parents=True, exist_ok=True)
        arguments = [pipeline, str(lora or ""), str(guidance), str(result)]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(result.read_text())


def slug(run: Run) -> str:
    """Return a folder name for an experiment."""
    return "_".join("".join(c if c.isalnum() else " " for c in f"{run.group} {run.name}".lower()).split())


def measure(run: Run, seed: int, output: Path, rewards: dict[str, Path]) -> np.ndarray:
    """Align and judge a pipeline; return each picture's utility minus that of the pipeline before alignment."""
    folder = output / f"{slug(run)}_seed{seed}"
    before = judge(run.pipeline, None, run.guidance, output / f"before_{run.pipeline}_{run.guidance:g}.json")
    if not (folder / "trained").exists():
        latentreward(
            folder / "run.log",
            "fit",
            f"--config={CONFIGS}/align/{run.config}.yaml",
            *(option.format(seed=seed, pairs=output / "data" / "pickapic", **rewards) for option in run.options),
            f"--model.guidance_scale={run.guidance}",
            f"--trainer.default_root_dir={folder}",
            f"--seed_everything={seed}",
        )
        (folder / "trained").touch()
    after = judge(run.pipeline, folder / "lora", run.guidance, folder / "judged.json")
    return np.array(after["utility"]) - np.array(before["utility"])


def print_tables(results: dict[Run, list[np.ndarray]], output: Path) -> None:
    """Print one table per group."""
    from latentreward.metrics.bootstrap import bootstrap_interval, student_interval

    for group in dict.fromkeys(run.group for run in results):
        rows = []
        for run, differences in results.items():
            if run.group == group:
                before = output / f"before_{run.pipeline}_{run.guidance:g}.json"
                start = float(np.mean(json.loads(before.read_text())["utility"]))
                change, low, high, _ = bootstrap_interval(differences)
                seeds = ", ".join(f"{difference.mean():+.3f}" for difference in differences)
                interval = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
                student = student_interval([difference.mean() for difference in differences])
                over_seeds = f"[{student.low:+.3f}, {student.high:+.3f}]" if len(differences) > 1 else "–"
                rows.append([run.name, f"{start:.3f}", f"{start + change:.3f}", interval, over_seeds, seeds])
        columns = ("run", "utility before", "after", "change [95 %]", "95 % over seeds", "of each seed")
        table(group, columns, rows)


def main() -> None:
    """Run the experiments without results so far, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_alignment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="*", help="groups to run")
    arguments = parser.parse_args()
    output, seeds = arguments.output.resolve(), range(arguments.seeds)
    chosen = [run for run in RUNS if not arguments.only or run.group in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        kinds = {"lrm": ("lrm_tiny", "pickapic"), "dina": ("dina_lrm_tiny", "hpdv3")}
        used = [kind for kind in kinds if any(f"{{{kind}}}" in option for run in chosen for option in run.options)]
        jobs = {(kind, seed): pool.submit(train_reward, output, *kinds[kind], seed) for kind in used for seed in seeds}
        rewards = {key: job.result() for key, job in jobs.items()}
        for pipeline, guidance in {(run.pipeline, run.guidance) for run in chosen}:
            judge(pipeline, None, guidance, output / f"before_{pipeline}_{guidance:g}.json")
        runs = {
            (run, seed): pool.submit(measure, run, seed, output, {kind: rewards[kind, seed] for kind in used})
            for run in chosen
            for seed in seeds
        }
        results = {run: [runs[run, seed].result() for seed in seeds] for run in chosen}
    print_tables(results, output)


if __name__ == "__main__":
    main()
