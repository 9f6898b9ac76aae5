"""Measure ``latentreward score`` against a bare model loop, and its start-up and gallery; prints a Markdown table.

    python benchmarks/score_command.py [--images 1000] [--rounds 8] [--batch_size 8] [--size mid]

The reward model has random weights (a size of ``random_pipelines.py``) and lies in a run folder. The images are JPEGs
of 160 × 128 pixels, each with its prompt in a text file. In every round, the command scores some of the images in this
process; then the loop of ``scoring.py`` (decode, VAE, text encoder, network, head) scores the same images. The ratio
divides the scoring time that the command reports by the loop's time. Then the command runs once on all images in its
own process: start-up is the time to the first image, including imports and loading of the model. A second run, which
finds the table complete, writes the page. Everything runs in one thread.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from measuring import Goal, ratio, table
from PIL import Image
from random_pipelines import pipeline_folder
from scoring import bare_loop, ready
from transformers import CLIPTextConfig, CLIPTextModel

from latentreward.apps.cli import main as latentreward
from latentreward.diffusion import sd15
from latentreward.reward import CLIPProjectionHead, RewardModel

WIDTH, HEIGHT = 160, 128


def write_model(folder: Path, size: str) -> Path:
    """Write a pipeline with random weights, and a run whose checkpoint holds a reward on that pipeline."""
    pipeline, run = folder / "pipeline", folder / "run"
    shutil.copytree(pipeline_folder(size), pipeline)
    torch.manual_seed(0)
    for part, family in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        family.from_config(json.loads((pipeline / part / "config.json").read_text())).save_pretrained(pipeline / part)
    text_config = CLIPTextConfig(**json.loads((pipeline / "text_encoder" / "config.json").read_text()))
    CLIPTextModel(text_config).save_pretrained(pipeline / "text_encoder")
    backbone = sd15(str(pipeline))
    model = ready(RewardModel(backbone, CLIPProjectionHead(backbone.feature_spec)))
    run.mkdir()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "exif": "apply"}, run / "last.ckpt")
    parts = {
        "backbone": {"class_path": "sd15", "init_args": {"source": str(pipeline)}},
        "head": {"class_path": "CLIPProjectionHead"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "LRMModule", "init_args": parts}}))
    return run


def write_images(folder: Path, count: int) -> list[Path]:
    """Write JPEGs of smooth noise and text files with their prompts, two images per prompt."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        files.append(folder / f"{number:04d}.jpg")
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(files[-1], quality=95)
        files[-1].with_suffix(".txt").write_text(f"picture {number // 2} of noise")
    return files


def command_seconds(files: Sequence[Path], folder: Path, run: Path, batch_size: int) -> float:
    """Run the command in this process; return the seconds of scoring that the command reports, without loading."""
    listed, printed = folder / "list.csv", io.StringIO()
    with listed.open("w", newline="") as stream:
        rows = [(file.relative_to(folder), file.with_suffix(".txt").read_text()) for file in files]
        csv.writer(stream).writerows([("image", "prompt"), *rows])
    output = folder / f"{files[0].stem}.parquet"
    with redirect_stdout(printed):
        latentreward(
            ["score", str(listed), str(output), f"--model={run}", "--device=cpu", f"--batch_size={batch_size}"]
        )
    return seconds_in(r"images scored in ([\d.]+) s", printed.getvalue())


def loop_seconds(model: RewardModel, files: Sequence[Path], batch_size: int) -> float:
    """Return the seconds that the bare loop takes, including the reading of files."""
    start = time.perf_counter()
    prompts = [file.with_suffix(".txt").read_text() for file in files]
    bare_loop(model, prompts, [file.read_bytes() for file in files], batch_size)
    return time.perf_counter() - start


def whole_run(folder: Path, run: Path, batch_size: int) -> tuple[str, float]:
    """Score the folder of images in a process, then write the page in another.

    Returns:
        Output of both processes, and wall seconds of the first one.
    """
    command = [sys.executable, "-m", "latentreward", "score", "images", "scores.csv", f"--model={run}", "--device=cpu"]
    command += [f"--batch_size={batch_size}"]
    environment, printed, walls = {**os.environ, "OMP_NUM_THREADS": "1"}, "", []
    for more in ([], ["--gallery=gallery.html"]):
        start = time.perf_counter()
        result = subprocess.run(
            [*command, *more], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        walls.append(time.perf_counter() - start)
        printed += result.stdout
    return printed, walls[0]


def seconds_in(pattern: str, printed: str) -> float:
    """Return the number that ``pattern`` captures in the command's output."""
    match = re.search(pattern, printed)
    assert match is not None, printed
    return float(match[1])


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--size", default="mid")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="score_command_") as name:
        folder = Path(name)
        run, files = write_model(folder, options.size), write_images(folder / "images", options.images)
        model = RewardModel.from_pretrained(run)
        ours, theirs = [], []
        for share in np.array_split(np.array(files, dtype=object), options.rounds):
            ours.append(command_seconds(share, folder, run, options.batch_size))
            theirs.append(loop_seconds(model, share, options.batch_size))
        printed, wall = whole_run(folder, run, options.batch_size)
        patterns = (r"model loaded in ([\d.]+) s", r"images scored in ([\d.]+) s", r"images written in ([\d.]+) s")
        loading, scoring, drawing = (seconds_in(pattern, printed) for pattern in patterns)
        page = (folder / "gallery.html").stat().st_size
    share = sum(ours) / sum(theirs)
    rates = [f"{options.images / sum(seconds):.2f}" for seconds in (ours, theirs)]
    table(
        f"latentreward score, {options.images} images, {options.size}, batches of {options.batch_size}, one thread",
        ("command, images/s", "bare loop, images/s", "time of command / loop, in all", "by rounds", "goal"),
        [[*rates, f"{share:.3f}", ratio(ours, theirs), Goal(share, most=1.1)]],
    )
    table(
        "One process",
        ("start-up and exit, s", "of it the model, s", "scoring, s", "page, s", "page, MB"),
        [[f"{n:.1f}" for n in (wall - scoring, loading, scoring, drawing, page / 1e6)]],
    )


if __name__ == "__main__":
    main()
