"""Computed memory and computation of the shipped runs, as a Markdown table: ``latentreward fit … --estimate`` for each.

Usage: ``python benchmarks/estimates.py [--all]``; some fifteen minutes, with ``--all`` half an hour. Without ``--all``
the recipes, the rewards on flow families, the alignment of full-size generators, and LPO of the other policies; with it
every model file and the tiny ones too. The last columns are the time of the command, by the clock and on
the processor.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from measuring import table

from latentreward.diffusion.families.base import families

ROOT = Path(__file__).resolve().parents[1]
OVER = {"lrm_hpdv2": "lrm_sd15", "dina_lrm_sd35_cached": "dina_lrm_sd35", "dina_lrm_sd35_code": "dina_lrm_sd35"}
"""Recipe → the one that it is stacked over."""
DATA = {
    "dina_lrm_sd35": ("hpdv3",),
    "lrm_sd21": ("pickapic_v1", "--data.size=768", "--data.batch_size=8"),
    "lrm_sd3": ("pickapic_v1", "--data.size=1024", "--data.batch_size=4"),
    "lrm_sdxl": ("pickapic_v1", "--data.size=1024", "--data.batch_size=4"),
}
"""Full-size model file → data file and settings that its head comment names; see :func:`runs` for others."""
NO_CONFIG = ("hidream",)
"""Families of which the package keeps no published config."""
NUMBERS = {
    "trained": r"^  (?:network|text encoders|head|scorer|reward) +[\d.]+ +([\d.]+)",
    "peak": r"^  peak +([\d.]+)$",
    "kept": r"^  kept for the backward pass +([\d.]+)$",
    "rollout": r"^  rollout +(\S+)$",
    "step": r"^  optimiser step of \d+ batch.* +(\S+)$",
}
HEADER = ("file", "trained, M", "peak, GB", "kept for backward, GB", "rollout, TFLOP", "step, TFLOP", "s", "CPU s")


def config(room: str, name: str) -> list[str]:
    """Option that names a shipped file."""
    return ["--config", f"configs/{room}/{name}.yaml"]


def runs(every: bool) -> dict[str, list[str]]:
    """Name of a run → its options."""
    found: dict[str, list[str]] = {}
    for name in names("recipes"):
        found[f"recipes/{name}"] = [*(config("recipes", OVER[name]) if name in OVER else []), *config("recipes", name)]
    for name in names("align"):
        if every or not name.endswith("tiny"):
            found[f"align/{name}"] = config("align", name)
    for name in names("policy"):
        if name not in NO_CONFIG and not (ROOT / f"configs/align/lpo_{name}.yaml").exists():
            found[f"policy/{name} + method/lpo"] = [*config("policy", name), *config("method", "lpo")]
    of_families = {f"dina_lrm_{name}" for name in (*families(), "sd35_large") if name not in NO_CONFIG}
    for name in (name for name in names("model") if (every or name in of_families) and not name.endswith(NO_CONFIG)):
        tiny = name.endswith("tiny")
        usual = ("hpdv3",) if name in of_families else ("pickapic_v1",)
        data, *more = ("tinyworld_pickapic",) if tiny else DATA.get(name, usual)
        trainer = config("trainer", "cpu" if tiny else "one_gpu")
        found[f"model/{name}"] = [*config("model", name), *config("data", data), *trainer, *more]
    return found


def names(room: str) -> list[str]:
    """Files of a folder of configs."""
    return sorted(path.stem for path in (ROOT / "configs" / room).glob("*.yaml"))


def row(name: str, options: list[str]) -> list[str]:
    """Run the command, and return its numbers."""
    began, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "latentreward", "fit", *options, "--estimate"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise SystemExit(f"{name}: {shown.stderr}")
    seconds, after = time.perf_counter() - began, getrusage(RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sums = {
        key: sum(map(float, re.findall(pattern, shown.stdout, flags=re.MULTILINE))) for key, pattern in NUMBERS.items()
    }
    cells = [f"`{name}`", f"{sums['trained']:.1f}", f"{sums['peak']:.1f}", f"{sums['kept']:.1f}"]
    cells += [
        f"{sums['rollout']:.0f}" if sums["rollout"] else "–",
        f"{sums['step']:.0f}",
        f"{seconds:.0f}",
        f"{computing:.0f}",
    ]
    return cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every shipped file")
    every = parser.parse_args().all
    table("Computed costs of the shipped runs", HEADER, (row(name, options) for name, options in runs(every).items()))


if __name__ == "__main__":
    main()
