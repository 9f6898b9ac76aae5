"""Run the main jobs at the true widths of SD1.5, SDXL and SD3.5-Medium, with random weights; prints Markdown tables.

    python benchmarks/fullsize [--folder runs/fullsize] [--only NAME ...] [--tiny] [--accelerator cpu]

Images are small, runs have few steps, and where a name says so blocks or T5 are cut. Jobs run one after the other, each
in a process of its own; a job whose result lies in ``FOLDER/results`` is not run again. A group's pipeline and runs are
removed after its last job, so that the disk holds one group at a time: at most 20 GB. ``--tiny`` takes tiny networks.
All results of a folder are of the same options, which ``FOLDER/settings.json`` keeps.

Memory on a CPU is the proportional set size of all processes of the job, minus that after the imports; on a GPU it is
the most that torch allocated. Linux only.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs import GROUPS, Job, Sizes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import available, family, proportional

from latentreward.core.storage.durable import write_file

HERE = Path(__file__).resolve().parent
SPARE = 2 * 10**9
"""Bytes of memory that must stay available; a job that takes more is ended."""
PAUSE, LONGEST = 0.1, 2.0
"""Least and most seconds between two looks at the memory."""
PIPELINES = {"sd15": "SD15_PATH", "sdxl": "SDXL_PATH", "sdxl_cut": "SDXL_PATH", "z_image": "Z_IMAGE_PATH"}
"""Group → variable of the configs that names its pipeline; SD35_PATH for others."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one Markdown table."""
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


class Runner:
    """Runner of jobs, one after the other.

    Args:
        folder: Folder of results, pipelines and runs.
        sizes: What is cut.
        tiny: Whether the networks are tiny.
    """

    def __init__(self, folder: Path, sizes: Sizes, tiny: bool) -> None:
        self.folder, self.sizes, self.tiny = folder.absolute(), sizes, tiny
        self.results = self.folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self._estimates: dict[tuple[str, ...], str] = {}

    def run_group(self, group: str, names: Sequence[str]) -> None:
        """Run the jobs of a group that have no result, or of which ``names`` has the name; then remove its files.

        A job needs what the jobs before it left: if the group's folder is not there, all jobs up to the last are run.
        """
        place, jobs = self.folder / group, [job for job in GROUPS[group] if not names or job.name in names]
        if all(map(self.result, jobs)):
            return
        if not place.is_dir():
            for job in GROUPS[group]:
                (self.results / job.file).unlink(missing_ok=True)
            began = time.perf_counter()
            command = [sys.executable, HERE / "files.py", group, self.folder, *(["--tiny"] if self.tiny else [])]
            subprocess.run(command, check=True)
            print(f"{group}: files written in {time.perf_counter() - began:.0f} s", flush=True)
        last = max(GROUPS[group].index(job) for job in jobs)
        for job in GROUPS[group][: last + 1]:
            if not self.result(job):
                self.run(group, job)
        if all(map(self.result, GROUPS[group])):
            shutil.rmtree(place)

    def run(self, group: str, job: Job) -> None:
        """Run a job and write its result.

        Raises:
            SystemExit: If the job fails, or too little memory is left.
        """
        place, began = self.folder / group, time.perf_counter()
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(place / "datasets"),
            PIPELINES.get(group, "SD35_PATH"): group,
            "CLIP_L_PATH": "clip_l",
            "PICKAPIC_ROOT": "../data/pickapic",
            "HPDV3_ROOT": "../data/hpdv3",
            "MPCF_SCORES": "../data/gaps.csv",
            "PROMPTS": "../data/prompts.txt",
            "CACHE_ROOT": "cache",
            "LRM_PATH": "published",
            "DINA_PATH": "runs/dina_lrm_sd35",
        }
        arguments = self.sizes.of(job.command)
        (place / "rounds.json").unlink(missing_ok=True)
        found: dict[str, Any] = self.estimate(job, place, variables) if job.needs else {}
        found |= self.watch(job, arguments, place, variables)
        if (rounds := place / "rounds.json").is_file():
            found["rounds"] = json.loads(rounds.read_text())[1:]
        found |= {"name": job.name, "seconds": time.perf_counter() - began, "disk": self.disk(), "needs": job.needs}
        write_file(self.results / job.file, json.dumps(found, indent=1))
        for name in job.frees:
            shutil.rmtree(place / name)
        print(" | ".join(self.row(found)), flush=True)

    def estimate(self, job: Job, place: Path, variables: dict[str, str]) -> dict[str, float]:
        """Return what ``fit --estimate`` computes of a job: the peak, or the size of the weights."""
        options = self.sizes.of(job.estimated) if job.estimated else self.sizes.of(job.command)[1:]
        options = [option for option in options if not option.startswith("--ckpt_path")]
        if (text := self._estimates.get((*options,))) is None:
            command = [sys.executable, "-m", "latentreward", "fit", *options, "--estimate"]
            shown = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
            if shown.returncode:
                raise SystemExit(f"{job.name}: {shown.stderr}")
            text = self._estimates[*options,] = shown.stdout
        number = r"peak +([\d.]+)" if job.needs == "peak" else r"\D+ +[\d.]+ +[\d.]+ +([\d.]+)"
        sizes = re.findall(rf"^  {number}$", text, flags=re.MULTILINE)
        return {"estimate": 1e9 * sum(map(float, sizes))}

    def watch(self, job: Job, arguments: list[str], place: Path, variables: dict[str, str]) -> dict[str, float]:
        """Run the command of a job; return its memory after the imports and at the peak, in bytes.

        Raises:
            SystemExit: If the command fails, or too little memory is left.
        """
        note, log = place / "process.json", (self.results / job.file).with_suffix(".log")
        note.unlink(missing_ok=True)
        peak = 0
        with log.open("w") as stream:
            command = [sys.executable, HERE / "process.py", note, *arguments]
            process = subprocess.Popen(command, cwd=place, env=variables, stdout=stream, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    began = time.perf_counter()
                    peak = max(peak, proportional(*family(process.pid)))
                    if available() < SPARE:
                        raise SystemExit(f"{job.name}: ended, since less than {SPARE / 1e9:.0f} GB of memory were left")
                    time.sleep(min(max(PAUSE, 15 * (time.perf_counter() - began)), LONGEST))
            finally:
                process.kill()
                process.wait()
        if process.returncode:
            raise SystemExit(f"{job.name} failed: {log}\n" + "".join(log.read_text().splitlines(True)[-5:]))
        noted = json.loads(note.read_text())
        return {"imports": noted["imports"], "peak": noted.get("allocated", peak - noted["imports"])}

    def disk(self) -> int:
        """Return the bytes of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def found(self) -> list[dict[str, Any]]:
        """Return the results, in the order of the jobs."""
        return [result for jobs in GROUPS.values() for job in jobs if (result := self.result(job))]

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return a job's result; None if there is none that can be read."""
        try:
            return json.loads((self.results / job.file).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def row(self, found: dict[str, Any]) -> list[str]:
        """Return a row of the table of memory."""
        cells = [found["name"], f"{found['peak'] / 1e9:.2f}", "", "", "", ""]
        if found["needs"]:
            place = 2 if found["needs"] == "peak" else 4
            cells[place : place + 2] = [f"{found['estimate'] / 1e9:.2f}", f"{found['peak'] / found['estimate']:.2f}"]
        return [*cells, f"{found['seconds']:.0f}", f"{found['disk'] / 1e9:.1f}"]

    def print_tables(self) -> None:
        """Print the tables of memory and of step times."""
        found = self.found()
        columns = ("job", "peak", "estimate", "peak / estimate", "weights", "peak / weights", "seconds", "disk")
        table("Memory at full size, GB; goals 0.75 to 1.25 of the estimate", columns, map(self.row, found))
        print(f"\nIn all {sum(one['seconds'] for one in found) / 60:.0f} minutes with the estimates.")
        rows = []
        for one in found:
            if len(rounds := one.get("rounds", [])) > 1:
                ratios = sorted(step / bare for step, bare in rounds)
                step, bare = (statistics.median(times) for times in zip(*rounds, strict=True))
                spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
                rows.append([one["name"], str(len(rounds)), f"{step:.2f}", f"{bare:.2f}", spread])
        columns = ("training step", "rounds", "ours, s", "bare calls, s", "ratio")
        table("A training step against bare calls of diffusers, in turn; goal 1.05", columns, rows)


def keep_settings(folder: Path, settings: dict[str, Any]) -> str | None:
    """Keep the options of a new folder there; return in words those of a folder that has others, or None."""
    kept = folder / "settings.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        return None if found == settings else ", ".join(f"{name} {json.dumps(value)}" for name, value in found.items())
    if folder.is_dir() and any(folder.iterdir()):
        return "options that it does not tell"  # an older version of this script did not keep them
    write_file(kept, json.dumps(settings))
    return None


def main() -> None:
    """Run the jobs without a result, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fullsize"))
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="jobs, with those before them in a group")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=6, help="training steps that are timed, in runs that time them")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # watch() then ends its job's process
    names = [job.name for jobs in GROUPS.values() for job in jobs]
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"--only: there is no job {unknown[0]!r}; choose from {', '.join(map(repr, names))}")
    settings = {"tiny": options.tiny, "accelerator": options.accelerator, "rounds": options.rounds}
    if others := keep_settings(options.folder, settings):
        parser.error(f"{options.folder} has results of {others}; choose another --folder for these options")
    sizes = Sizes(64 if options.tiny else 128, 1 + options.rounds, options.accelerator)
    runner = Runner(options.folder, sizes, options.tiny)
    for group, jobs in GROUPS.items():
        if not options.only or any(job.name in options.only for job in jobs):
            runner.run_group(group, options.only)
    runner.print_tables()


if __name__ == "__main__":
    main()
