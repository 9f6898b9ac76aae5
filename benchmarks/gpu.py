"""Measure full-size scoring and training on one GPU, unattended: ``make bench-gpu``; prints Markdown tables.

    python benchmarks/gpu.py [BLOCK ...] [--output DIR] [--minutes 22] [--wheels DIR] [--device cuda] [--tiny]

Weights are random and made on the card; nothing is downloaded and nothing installed. The script runs from a checkout
with any PyTorch from the floor in setup.cfg on (an older one is tried, and named) and with the packages of setup.cfg;
``--wheels DIR`` unpacks the pure-Python wheels in DIR (diffusers, jsonargparse, omegaconf, …) and imports from there.

Each block is a process of at most 8 minutes that writes OUTPUT/BLOCK.json after every row. A block that is done is
skipped, so the command goes on where it was interrupted. A row that runs out of memory or fails says so; a block whose
rows have all failed is not done.

``scoring``    a step's score by the latent reward (LRM on SD1.5 and SDXL, DiNa-LRM on SD3.5-Medium) against pixels:
               VAE decoder and CLIP-H, with x̂_0 predicted anew (guided) or reused from the sampler
``vlm``        DiNa-LRM, one level and an ensemble of 3, against a scorer of Qwen2-VL-7B's size with VAE decoder, on one
               1024² image: score, gradient with respect to the latents, and step of an SD3.5-Medium policy
``rewards``    training steps of LRM, DiNa-LRM and the other heads with the shipped settings, and of an 8-bit optimiser
``alignment``  training steps of LPO, GRPO and ReFL with the shipped settings, rollouts included
``methods``    the same for trajectory GRPO, DiffusionNFT, AWM, RAM, DGPO, CRD, OPSD, ReFL to a state, PRFL
``execution``  float32, bfloat16 and checkpointing in a DiNa-LRM step
``switches``   channels_last, cudnn.benchmark, fused optimiser, TF32, fused LoRA: steps of LRM, LPO, DiNa-LRM, GRPO
``performance``  training steps and rollouts with compiled blocks, and eager with the same weights
``families``   one 1024² latent of every family: a reward on half of the blocks, and a checkpointed step of the policy

``--device cpu --tiny`` tries all blocks at tiny sizes with one thread, for tests. What is measured with either option
goes to OUTPUT/trial.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = ("scoring", "vlm", "rewards", "alignment", "methods", "execution", "switches", "performance", "families")
FLOOR = (2, 13)
"""Oldest PyTorch of setup.cfg."""
BLOCK_SECONDS = 480


def import_path(wheels: Path | None) -> str:
    """Return the value of PYTHONPATH for a block; wheels are unpacked into a folder beside them."""
    places = [ROOT / "src", ROOT]
    if wheels is not None:
        places.append(unpacked := wheels / "unpacked")
        for wheel in () if unpacked.is_dir() else sorted(wheels.glob("*.whl")):
            ZipFile(wheel).extractall(unpacked)
    return os.pathsep.join([*(str(place.resolve()) for place in places), os.environ.get("PYTHONPATH", "")])


def is_done(path: Path, device: str, tiny: bool) -> bool:
    """Tell whether a block was measured to its end with these settings, and not all of its rows failed."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    states = [str(row[1]) for table in found["tables"] for row in table["rows"]]
    failed = all(state.startswith("failed: ") for state in states)
    return found["complete"] and (found["device"], found["tiny"]) == (device, tiny) and not failed


def has_cuda() -> bool:
    """Tell whether PyTorch can use a CUDA device."""
    import torch  # takes seconds, and the command needs nothing else of it

    return torch.cuda.is_available()


def main() -> None:
    """Run the blocks that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help=", ".join(BLOCKS))
    parser.add_argument("--output", type=Path, default=Path("runs/bench_gpu"))
    parser.add_argument("--minutes", type=float, default=22, help="time for all blocks")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of pure-Python wheels")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.blocks) - set(BLOCKS):
        parser.error(f"there is no block {', '.join(sorted(unknown))}; choose from {', '.join(BLOCKS)}")
    torch = version("torch")
    if tuple(map(int, torch.split(".")[:2])) < FLOOR:
        print(f"PyTorch {torch} is older than the oldest that is tested, {'.'.join(map(str, FLOOR))}")
    if options.device == "cuda" and not has_cuda():
        parser.exit(2, f"PyTorch {torch} finds no CUDA device; --device cpu --tiny tries the blocks without one\n")
    environment = {**os.environ, "PYTHONPATH": import_path(options.wheels), "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    output = options.output / "trial" if options.tiny or options.device == "cpu" else options.output
    ends, missing = time.monotonic() + 60 * options.minutes, []
    for name in options.blocks or BLOCKS:
        path = (output / f"{name}.json").resolve()
        if is_done(path, options.device, options.tiny):
            print(f"{name}: done already", flush=True)
            continue
        left = min(BLOCK_SECONDS, ends - time.monotonic())
        print(f"\n## {name}" if left > 0 else f"{name}: no time left", flush=True)
        script = str(ROOT / "benchmarks" / "gpu_blocks.py")
        command = [sys.executable, script, name, str(path), options.device, *(["tiny"] if options.tiny else [])]
        try:
            if left > 0:
                subprocess.run(command, cwd=ROOT, env=environment, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {left:.0f} s; its rows so far are in {path}", flush=True)
        if not is_done(path, options.device, options.tiny):
            missing.append(name)
    if missing:
        sys.exit(f"not measured to the end: {', '.join(missing)}; the same command goes on with them")


if __name__ == "__main__":
    main()
