"""Steps of the rows, resolved for an arm and a seed: equal steps of several rows are one task."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from latentreward.core.settings.rewriting import find_config
from latentreward.core.storage.digests import digest

CONFIG = "--config="
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")
"""Placeholder in a step's arguments: ``{out}``, ``{seed}``, or the name of the step whose output folder it stands for.

Braces around anything else, such as those of JSON or of ``${SD15_PATH}``, stay.
"""


@dataclass(frozen=True)
class Step:
    """Command that runs in a process of its own."""

    run: tuple[str, ...]  # arguments of the process, starting with a subcommand of ``latentreward``
    module: str = ""  # module to run as a program instead of the command line; empty for the command line


@dataclass(frozen=True)
class Task:
    """Step of an arm and a seed, with its placeholders resolved."""

    name: str  # name of the step
    module: str  # as of :class:`Step`
    arguments: tuple[str, ...]  # arguments that may contain placeholders
    inputs: Mapping[str, "Task"] = field(hash=False)  # placeholder → task whose output it stands for
    seed: int  # seed that ``{seed}`` stands for
    key: str  # digest of all that the output depends on apart from source files; equal tasks have equal keys

    def command(self, folder: Path) -> list[str]:
        """Return the arguments with placeholders replaced by the seed and by folders below ``folder``."""
        places = {name: str(task.output(folder)) for name, task in self.inputs.items()}
        places |= {"out": str(self.output(folder)), "seed": str(self.seed)}
        return [PLACEHOLDER.sub(lambda found: places.get(found[1], found[0]), text) for text in self.arguments]

    def output(self, folder: Path) -> Path:
        """Return the folder of the task's output, below ``folder``."""
        return folder / f"{self.name}-{self.key[:16]}" / "out"

    def needed(self) -> Iterator["Task"]:
        """Yield the task and all that it depends on, dependencies first, possibly repeatedly."""
        for task in self.inputs.values():
            yield from task.needed()
        yield self


def resolve(steps: Mapping[str, Step], name: str, seed: int) -> Task:
    """Resolve a step and the steps that its arguments name."""
    found = steps[name]
    arguments = found.run
    names = {place for text in arguments for place in PLACEHOLDER.findall(text)} & steps.keys()
    inputs = {one: resolve(steps, one, seed) for one in sorted(names)}
    known = {one: task.key for one, task in inputs.items()} | {"seed": str(seed)}
    resolved = [PLACEHOLDER.sub(lambda place: known.get(place[1], place[0]), text) for text in arguments]
    configs = [text for text in arguments if text.startswith(CONFIG) and not PLACEHOLDER.search(text)]
    files = [config_digest(find_config(text.removeprefix(CONFIG))) for text in configs]
    key = digest(["\0".join((found.module, *resolved, "", *files))])
    return Task(name, found.module, arguments, inputs, seed, key)


@cache
def config_digest(path: str) -> str:
    """Digest the settings in a YAML file; comments, layout and a callback that only draws pictures do not count."""
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    trainer = settings.get("trainer") or {}
    if isinstance(callbacks := trainer.get("callbacks"), list):
        trainer["callbacks"] = [one for one in callbacks if not str(one["class_path"]).endswith(".SampleGrid")]
    return digest([repr(settings)])
