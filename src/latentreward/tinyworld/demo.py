"""``make demo``: train the two tiny reward models through the command line and show what they learned."""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CEILING = 0.870
"""Accuracy of the true utility against the drawn, noisy labels; no model can do better."""


@dataclass(frozen=True)
class Training:
    """One model of the demo.

    Attributes:
        title: What it is, for people.
        model: Config of the model.
        data: Config of the data.
        levels: Names of the evaluation levels, as the module logs them, and as people read them.
    """

    title: str
    model: str
    data: str
    levels: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Short name: folder of its results."""
        return Path(self.model).stem

    def command(self, output: Path, options: list[str]) -> list[str]:
        """The command line that trains it."""
        configs = [self.model, self.data, "configs/trainer/demo.yaml"]
        return [
            *(sys.executable, "-m", "latentreward", "fit"),
            *(f"--config={config}" for config in configs),
            f"--data.root={output / 'data' / Path(self.data).stem}",
            f"--trainer.default_root_dir={output / self.name}",
            *options,
        ]


TRAININGS = (
    Training(
        "LRM: tiny Stable Diffusion's U-Net, Pick-a-Pic layout",
        "configs/model/lrm_tiny.yaml",
        "configs/data/tinyworld_pickapic.yaml",
        tuple((f"t{t}", f"t = {t}") for t in (1, 251, 501, 801)),
    ),
    Training(
        "DiNa-LRM: tiny SD3.5's transformer, HPDv3 layout",
        "configs/model/dina_lrm_tiny.yaml",
        "configs/data/tinyworld_hpdv3.yaml",
        (*((f"sigma{s}", f"σ = {s}") for s in (0.2, 0.5, 0.8)), ("ensemble", "ensemble")),
    ),
)


def scalars(folder: Path) -> dict[str, tuple[int, float]]:
    """Last step and value of every scalar in the TensorBoard log of ``folder``; empty if there is none yet."""
    if not list(folder.glob("events.out.tfevents.*")):
        return {}
    log = EventAccumulator(str(folder), size_guidance={"images": 1})
    log.Reload()
    return {tag: (log.Scalars(tag)[-1].step, log.Scalars(tag)[-1].value) for tag in log.Tags()["scalars"]}


def train(output: Path, options: list[str]) -> None:
    """Run all trainings side by side, one thread each, and say how they are doing.

    Raises:
        SystemExit: If one of them fails; its messages lie in ``train.log`` of its folder.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {}
    for training in TRAININGS:
        folder = output / training.name
        folder.mkdir(parents=True, exist_ok=True)
        print("$", " ".join(training.command(output, options)).replace(sys.executable, "python"), flush=True)
        with (folder / "train.log").open("w") as log:
            running[training] = subprocess.Popen(
                training.command(output, options), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
    started = time.monotonic()
    while any(process.poll() is None for process in running.values()):
        time.sleep(5)
        parts = []
        for training, process in running.items():
            parts.append(f"{training.name} {progress(output / training.name, process.poll() is not None)}")
        print(f"  {time.monotonic() - started:4.0f} s  " + "  |  ".join(parts), flush=True)
        if any(process.returncode not in (None, 0) for process in running.values()):
            break
    for training, process in running.items():
        if process.poll() not in (None, 0):
            for other in running.values():
                other.terminate()
            path = output / training.name / "train.log"
            sys.exit(f"{training.name} failed; the end of {path}:\n{path.read_text()[-2000:]}")


def progress(folder: Path, ended: bool) -> str:
    """Where a training stands, in a few words."""
    values = scalars(folder)
    if ended:
        return "done"
    if "train/loss" not in values:
        return "starting"
    (step, loss), (_, accuracy) = values["train/loss"], values["train/accuracy"]
    return f"step {step + 1}, loss {loss:.3f}, batch accuracy {accuracy:.2f}"


def report(output: Path) -> None:
    """Print held-out accuracy by noise level, and where everything lies."""
    for training in TRAININGS:
        folder = output / training.name
        values = scalars(folder)
        print(f"\n{training.title}\n  held-out pair accuracy against the drawn labels")
        for level, label in training.levels:
            print(f"    {label:<9} {values[f'val/accuracy_{level}'][1]:.3f}")
        print(f"    ceiling   {CEILING:.3f}   (the labels are noisy: the true utility itself agrees with so many)")
        print("    chance    0.500")
        print(f"  picture of scored pairs  {folder / 'scored_pairs.png'}")
        print(f"  checkpoint               {folder / 'reward.ckpt'}")
    print(f"\nlearning curves and pictures: .venv/bin/tensorboard --logdir {output}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m latentreward.tinyworld.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of all results (default: demo)")
    arguments, options = parser.parse_known_args()
    started = time.monotonic()
    train(arguments.output, options)
    report(arguments.output)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
