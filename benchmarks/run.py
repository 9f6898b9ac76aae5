"""Run the benchmarks of docs/measurements.md, each in a process of its own, and collect their tables.

    python benchmarks/run.py [NAME ...] [--output runs/bench] [--released DIR] [--quick]

Without names all run whose figures are ratios of times or memory, in this order; ``heads``, ``search``, ``estimates``,
``communication`` and ``released_utility`` run when named. Each writes OUTPUT/NAME.json: machine, load, versions,
commit, seconds, and tables whose cells hold medians, ranges and goals. OUTPUT/tables.md shows them all, goals first. A
benchmark is skipped if its file is there and neither its arguments, nor its source files, nor the package's have
changed since (comments and docstrings do not count); so the command goes on where it was interrupted. ``--quick`` tries
all at the smallest sizes, for tests, in the folder OUTPUT/quick.
"""

import argparse
import json
import os
import pkgutil
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import measuring

import latentreward
from latentreward.core.storage.digests import digest
from latentreward.core.storage.durable import write_file

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from tools.source_digests import code_digest, source_digest  # noqa: E402


@dataclass(frozen=True)
class Benchmark:
    """One process of ``make bench``.

    Attributes:
        script: Name of a script in this folder.
        arguments: Its arguments.
        quick: Its arguments in a trial at the smallest sizes.
        minutes: Time on two cores, roughly.
        ratios: Whether it runs unless others are named.
        released: Whether it takes ``--released``.
    """

    script: str
    arguments: str
    quick: str
    minutes: float
    ratios: bool = True
    released: bool = False


BENCHMARKS = {
    "start_up": Benchmark("start_up", "", "--rounds=1", 3),
    "report_statistics": Benchmark("report_statistics", "", "--groups=100", 4),
    "data": Benchmark("loading", "wait tiny rows", "tiny --repeats=1", 6),
    "stores": Benchmark("loading", "compare scale", "compare --kib 64 --repeats=1 --most=0.1", 9, released=True),
    "cache_writing": Benchmark("cache_writing", "", "--pairs=8 --repeats=1 --sizes=100", 3),
    "alignment": Benchmark("alignment", "", "passes rollout --size=toy --batch=2 --repeats=1", 12),
    "true_width": Benchmark("alignment", "scoring --size=sd15_side32 --repeats=3", "scoring --size=toy --batch=1", 8),
    "released": Benchmark(
        "released", "", "--sizes toy toy_sd35 --batch=4 --repeats=1 --images=8 --files=toy", 12, released=True
    ),
    "released_alignment": Benchmark(
        "released_alignment", "", "--sizes toy toy_sd35 --batch=2 --repeats=1", 6, released=True
    ),
    "scoring": Benchmark(
        "scoring", "--reward lrm_tiny dina_lrm_tiny", "throughput --sizes toy --images=8 --repeats=1", 20
    ),
    "frozen_precision": Benchmark("frozen_precision", "--reward lrm_tiny dina_lrm_tiny --pairs=3000", "--help", 12),
    "score_command": Benchmark("score_command", "--images=400", "--images=4 --rounds=1 --size=toy", 8),
    "serving": Benchmark(
        "serving", "", "throughput trajectories --size=toy_sd35 --rows=8 --trajectories=8 --repeats=1", 9
    ),
    "remote_reward": Benchmark("remote_reward", "", "--size=toy_sd35 --rows=2 --rounds=1", 6),
    "loading_memory": Benchmark("loading_memory", "", "--help", 4),
    "heads": Benchmark("heads", "", "--help", 25, ratios=False),
    "sampling": Benchmark("sampling", "", "--number=2 --repeats=1", 2),
    "search": Benchmark("search", "", "--help", 12, ratios=False),
    "estimates": Benchmark("estimates", "", "--help", 10, ratios=False),
    "communication": Benchmark("communication", "", "--help", 15, ratios=False),
    "released_utility": Benchmark("released_utility", "", "--help", 30, ratios=False, released=True),
}


@cache
def package_digest() -> str:
    """Digest all source files of the package."""
    found = pkgutil.walk_packages(latentreward.__path__, "latentreward.", onerror=lambda name: None)
    return source_digest(module.name for module in found)


def key_of(arguments: Sequence[str], scripts: Sequence[str]) -> str:
    """Digest what the figures of a benchmark depend on; ``scripts`` are files of this folder."""
    sources = (code_digest((FOLDER / name).read_text()) for name in sorted(scripts))
    return digest([" ".join(arguments), *sources, package_digest()])


def record(path: Path, script: str, arguments: list[str]) -> None:
    """Run a script in this process, and write what it measured to ``path``."""
    sys.argv, began = [script, *arguments], time.perf_counter()
    before = measuring.circumstances()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise
    used = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    scripts = sorted({path.name for path in used if path.parent == FOLDER} - {"run.py"} | {Path(script).name})
    content = {
        **before,
        "command": shlex.join([Path(script).name, *arguments]),
        "key": key_of(arguments, scripts),
        "scripts": scripts,
        "seconds": round(time.perf_counter() - began),
        "tables": [table.entries() for table in measuring.TABLES],
    }
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_done(path: Path, arguments: Sequence[str]) -> bool:
    """Tell whether ``path`` holds the figures of these arguments and of today's source files."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    known = all((FOLDER / name).is_file() for name in found["scripts"])
    return known and key_of(arguments, found["scripts"]) == found["key"]


def tables_page(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the parts of the page with all tables."""
    yield "# Benchmarks\n\n| benchmark | table | row | goal |\n|---|---|---|---|"
    for name, result in results.items():
        for table in result["tables"]:
            for row in table["rows"]:
                label = next((cell for cell in row if isinstance(cell, str | int)), "")
                yield from (
                    f"| {name} | {table['title']} | {label} | {cell['goal']} |"
                    for cell in row
                    if isinstance(cell, dict) and "goal" in cell
                )
    for name, result in results.items():
        facts = {key: value for key, value in result.items() if key not in ("tables", "key", "scripts", "command")}
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        yield f"\n## {name}: `{result['command']}`\n\n{told}"
        yield from (table["markdown"] for table in result["tables"])


def main() -> None:
    """Run what is wanted and not done, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--released", type=Path, metavar="DIR", help="folder with clones of released code")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    chosen = options.names or [name for name, one in BENCHMARKS.items() if one.ratios]
    output, failed = options.output / "quick" if options.quick else options.output, []
    output.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        benchmark, path = BENCHMARKS[name], output / f"{name}.json"
        arguments = shlex.split(benchmark.quick if options.quick else benchmark.arguments)
        if benchmark.released and options.released:
            arguments.append(f"--released={options.released}")
        if is_done(path, arguments):
            print(f"{name}: done already", flush=True)
            continue
        print(f"\n{name}, about {benchmark.minutes:g} minutes", flush=True)
        command = [sys.executable, __file__, "--record", str(path), str(FOLDER / f"{benchmark.script}.py"), *arguments]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
    results = {name: json.loads(path.read_text()) for name in BENCHMARKS if (path := output / f"{name}.json").is_file()}
    write_file(output / "tables.md", "\n".join(tables_page(results)) + "\n")
    print(f"\n{output / 'tables.md'} is written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
