"""One wrong leaf in a shipped configuration, run as far as one small step: ``python -m tests.faults.config_mutants``.

Each mutant should be refused in one line that names its setting, or be a value that the setting may have.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.forked import ROOT, Outcome, outcomes

BOMB = (
    "[&a [1, 1, 1, 1, 1, 1, 1, 1], "
    + ", ".join(f"&{name} [{', '.join([f'*{before}'] * 8)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True))
    + "]"
)
MUTATIONS = {
    "null": "null", ".nan": ".nan", ".inf": ".inf", "-1": "-1", "0": "0", "1.0e18": "1.0e18", "10**18": str(10**18),
    "empty text": '""', "text": "zzz", "[]": "[]", "{}": "{}", "bomb": BOMB, "self": "${SELF}",
    "duplicate": "duplicate", "unknown": "unknown",
}  # fmt: skip
"""Name -> YAML in the leaf's place; the last two add a key beside it."""
NEVER = {"bomb", "self", "duplicate", "unknown"}
NEVER_FOR_NUMBERS = {".nan", ".inf", "1.0e18", "10**18", "empty text", "text", "[]", "{}"}
NEVER_FOR_FLAGS = {*NEVER_FOR_NUMBERS, "-1"}
NEVER_FOR_TEXT = {"{}", "[]"}
MAY_BE_NEGATIVE = {
    "max_steps", "num_sanity_val_steps", "logit_scale", "devices", "mean", "shift", "gap", "m", "num_processes",
}  # fmt: skip
MAY_BE_NULL = {
    "filename", "save_on_train_epoch_end", "save_last", "limit_val_batches", "log_every_n_steps", "gradient_clip_val",
    "version", "default_root_dir", "revision", "name", "enable_model_summary", "enable_progress_bar",
}  # fmt: skip
"""Settings with a value in a shipped file whose type has None too."""
LIMIT_S = 300
"""Seconds after which a run is killed, and from which on it counts as one that hangs; each should take a few."""
KINDS = {
    "named": "refused in a line that names the setting",
    "unnamed": "refused in a line that does not",
    "accepted": "a value that the setting may have",
    "nonsense": "accepted all the same",
    "traceback": "a bug",
    "hang": "stopped at the limit",
}
PAIRS = {"batch_size": 4, "train_pairs": 16, "val_pairs": 8, "num_workers": 0}
PROMPTS = {"batch_size": 4, "prompts_per_rollout": 2, "batches_per_epoch": 2}
DATA = {"tinyworld_pickapic": PAIRS, "tinyworld_hpdv3": PAIRS, "tinyworld_cached": {"batch_size": 4}}
STEP = {"max_steps": 1, "limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class Base:
    """A configuration that runs in seconds: its subcommand with options, and its settings."""

    name: str
    command: tuple[str, ...]
    settings: dict[str, Any]


def merged(first: Any, second: Any) -> Any:
    """Settings of two files as the program stacks them, callbacks added up."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = {key: merged(first[key], second[key]) for key in first if key in second}
        return {**first, **second, **both}
    return [*first, *second] if isinstance(first, list) and isinstance(second, list) else second


def stack(*names: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in names:
        settings = merged(settings, yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()))
    return settings


def bases() -> list[Base]:
    """The shipped tiny configurations, made smaller; those that write what others read come first."""
    fits = {}
    for model, data in (
        ("lrm_tiny", "tinyworld_pickapic"),
        ("dina_lrm_tiny", "tinyworld_hpdv3"),
        ("dina_lrm_unet_tiny", "tinyworld_pickapic"),
        ("lrm_dit_tiny", "tinyworld_hpdv3"),
        ("spm_tiny", "tinyworld_pickapic"),
    ):
        fits[model] = stack(f"model/{model}", f"data/{data}", "trainer/cpu")
        fits[model]["trainer"]["logger"]["init_args"]["name"] = model
        fits[model]["data"]["init_args"].update(DATA[data])
    found = [Base(name, ("fit",), settings) for name, settings in fits.items()]
    found.append(Base("cache", ("cache", "runs/tinyworld/cache"), stack("cache/tinyworld")))
    for path in sorted((ROOT / "configs" / "align").glob("*_tiny.yaml")):
        settings = stack(f"align/{path.stem}")
        make_smaller(settings["data"]["init_args"])
        method = settings["model"]["init_args"]
        if "sampling" in method:
            method["sampling"]["num_inference_steps"] = 8
        if "stop_range" in method:
            method["stop_range"] = [min(step, 8) for step in method["stop_range"]]
        found.append(Base(path.stem, ("fit",), settings))
    for base in found:
        if base.command == ("fit",):
            base.settings["trainer"].update({**STEP, "log_every_n_steps": 1, "val_check_interval": 1.0})
            base.settings["trainer"].pop("check_val_every_n_epoch", None)
    judge = stack("evaluate/tiny")
    judge.update({"prompts": "prompts.txt", "batch_size": 2})
    judge["sampling"]["num_inference_steps"] = 2
    found.append(Base("evaluate", ("evaluate-policy", "judged", "--device=cpu"), judge))
    return found


def make_smaller(data: dict[str, Any]) -> None:
    """Set small numbers in the settings of a data module, or of both parts of ``PromptsAndImages``."""
    if "images" in data:
        for part in ("images", "prompts"):
            make_smaller(data[part]["init_args"])
    else:
        data.update(PAIRS if "root" in data else PROMPTS)


def leaves(settings: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of what is neither a filled mapping nor a list of them."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from leaves(value, (*path, key))
    elif isinstance(settings, list) and any(isinstance(item, dict) for item in settings):
        for index, item in enumerate(settings):
            yield from leaves(item, (*path, index))
    else:
        yield path


@dataclass(frozen=True)
class Mutant:
    """A base with one leaf changed."""

    base: Base
    path: tuple[str | int, ...]
    mutation: str

    @property
    def label(self) -> str:
        return f"{self.base.name}: {self.setting} = {self.mutation}"

    @property
    def setting(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def value(self) -> Any:
        node = self.base.settings
        for key in self.path:
            node = node[key]
        return node

    def text(self) -> str:
        """YAML of the settings."""
        settings = yaml.safe_load(yaml.safe_dump(self.base.settings))
        node = settings
        for key in self.path[:-1]:
            node = node[key]
        key, raw = self.path[-1], MUTATIONS[self.mutation].replace("SELF", self.setting)
        if self.mutation == "unknown":
            return yaml.safe_dump({**settings}) if isinstance(key, int) else _with(settings, node, f"{key}_zz", 1)
        node[key] = "MUTANT"
        lines = yaml.safe_dump(settings, sort_keys=False).splitlines()
        (number,) = [number for number, line in enumerate(lines) if line.endswith("MUTANT")]
        line = lines[number]
        if self.mutation == "duplicate":
            old = json.dumps(self.value)
            lines[number] = line.replace("MUTANT", old)
            lines.insert(number + 1, line.replace("- ", "  ").replace("MUTANT", old))
        else:
            lines[number] = line.replace("MUTANT", raw)
        return "\n".join(lines) + "\n"

    def is_named(self, line: str) -> bool:
        """Whether a refusal tells where to look."""
        if self.mutation == "bomb":
            return "line " in line
        names = [str(key) for key in self.path if isinstance(key, str) and key != "init_args"]
        of_class = names[-1] == "class_path" and len(names) > 1 and self.mutation != "duplicate"
        name = names[-2] if of_class else names[-1]
        return name in line or any(user in line for user in self.users())

    def users(self) -> Iterator[str]:
        """Last names of the settings whose value is this one's, such as a logger's folder."""
        for path in leaves(self.base.settings):
            node: Any = self.base.settings
            for key in path:
                node = node[key]
            if node == f"${{{self.setting}}}":
                yield str(path[-1])

    def is_nonsense(self) -> bool:
        """Whether no setting with this leaf's present value can mean the mutation."""
        value, name = self.value, str(self.path[-1])
        if self.mutation in NEVER or (self.mutation == "null" and value is not None and name not in MAY_BE_NULL):
            return True
        if isinstance(value, bool):
            return self.mutation in NEVER_FOR_FLAGS
        if isinstance(value, int | float):
            return self.mutation in NEVER_FOR_NUMBERS or (self.mutation == "-1" and name not in MAY_BE_NEGATIVE)
        if isinstance(value, str):
            return self.mutation in NEVER_FOR_TEXT
        return False


def _with(settings: Any, node: Any, key: str, value: Any) -> str:
    node[key] = value
    return yaml.safe_dump(settings, sort_keys=False)


def mutants(count: int, seed: int) -> list[Mutant]:
    """``count`` different mutants, spread over bases and mutations."""
    draw = random.Random(seed)
    every = [
        Mutant(base, path, mutation)
        for base in bases()
        for path in leaves(base.settings)
        for mutation in MUTATIONS
        if (mutation not in ("unknown", "duplicate") or isinstance(path[-1], str))
        and (path[-1] != "max_steps" or mutation != "-1")  # which trains without end, as it should
    ]
    draw.shuffle(every)
    return every[:count]


def classify(mutant: Mutant, outcome: Outcome) -> str:
    """What became of a mutant, in a word."""
    if outcome.status is None:
        return "hang"
    if "Traceback (most recent call last)" in outcome.stderr or outcome.status not in (0, 2):
        return "traceback"
    if outcome.status == 0:
        return "nonsense" if mutant.is_nonsense() else "accepted"
    return "named" if mutant.is_named(outcome.line) else "unnamed"


def run_mutants(chosen: Sequence[Mutant], folder: Path) -> Iterator[tuple[Mutant, Outcome]]:
    """Run the bases that write what others read, and then the mutants."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    first = [base for base in bases() if base.name in ("lrm_tiny", "dina_lrm_tiny", "cache")]
    texts = [(base, yaml.safe_dump(base.settings)) for base in first] + [(each.base, each.text()) for each in chosen]
    cases = []
    for number, (base, text) in enumerate(texts):
        (folder / f"{number}.yaml").write_text(text)
        cases.append(([*base.command, f"--config={number}.yaml"], folder))
    results = outcomes(cases, LIMIT_S, CUDA_VISIBLE_DEVICES="")
    for base in first:
        outcome = next(results)
        assert outcome.status == 0, (base.name, outcome.stderr)
    yield from zip(chosen, results, strict=True)


def told(chosen: Sequence[Mutant], folder: Path) -> Counter[str]:
    """Run mutants, print each that is not refused by name, and count what became of them."""
    table: Counter[str] = Counter()
    for mutant, outcome in run_mutants(chosen, folder):
        kind = classify(mutant, outcome)
        table[kind] += 1
        if kind != "named":
            tail = outcome.line or (outcome.stderr.strip().splitlines() or [""])[-1]
            print(f"{kind:10} {mutant.label}\n           {tail[:220]}", flush=True)
    return table


def main() -> None:
    """Print each odd outcome and a table; exit with 1 unless every mutant is refused by name or makes sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = mutants(given.count, given.seed)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        parts = [chosen[job :: given.jobs] for job in range(given.jobs)]
        folders = [Path(folder) / str(job) for job in range(given.jobs)]
        table = sum(pool.map(told, parts, folders), Counter[str]())
    for kind, meaning in KINDS.items():
        print(f"{table[kind]:5} {kind:10} {meaning}")
    sys.exit(any(table[kind] for kind in KINDS if kind not in ("named", "accepted")))


if __name__ == "__main__":
    main()
