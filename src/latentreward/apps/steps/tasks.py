"""Steps of long computations: commands that run in processes of their own and read each other's output folders."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator

from latentreward.core.errors import InputError, did_you_mean, one_line
from latentreward.core.settings.rewriting import check_yaml, find_config
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import STRICT

CONFIG = "--config="
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")
"""Placeholder in a step's arguments: ``{out}``, ``{seed}``, or the name of the step whose output folder it stands for.

Braces around anything else, such as those of JSON or of ``${SD15_PATH}``, stay.
"""


def split(given: Any) -> tuple[str, ...]:
    """Split the arguments of a process, which a YAML file holds as one text, with a shell's quotes."""
    if not isinstance(given, str):
        raise ValueError("it must be a text")
    return tuple(shlex.split(given))


Arguments = Annotated[tuple[str, ...], BeforeValidator(split)]
"""Arguments of a process."""


@dataclass(frozen=True)
class Step:
    """Command that runs in a process of its own."""

    __pydantic_config__ = STRICT
    run: Arguments  # arguments of the process, starting with a subcommand of ``latentreward``
    module: str = ""  # module to run as a program instead of the command line; empty for the command line
    quick: Arguments = ()  # arguments added for a trial of two steps
    pairs: str = ""  # name of the step that wrote the pairs which the step scores; empty if it scores no pairs


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


def resolve(
    steps: Mapping[str, Step],
    name: str,
    seed: int,
    added: Mapping[str, Sequence[str]] = MappingProxyType({}),
    quick: bool = False,
) -> Task:
    """Resolve a step and the steps that its arguments name.

    ``added`` holds arguments by the names of steps; ``quick`` adds those of a trial of two steps.
    """
    found = steps[name]
    arguments = [*found.run, *added.get(name, ()), *(found.quick if quick else ())]
    names = {place for text in arguments for place in PLACEHOLDER.findall(text)} & steps.keys()
    inputs = {one: resolve(steps, one, seed, added, quick) for one in sorted(names)}
    known = {one: task.key for one, task in inputs.items()} | {"seed": str(seed)}
    resolved = [PLACEHOLDER.sub(lambda place: known.get(place[1], place[0]), text) for text in arguments]
    configs = [text for text in arguments if text.startswith(CONFIG) and not PLACEHOLDER.search(text)]
    files = [config_digest(find_config(text.removeprefix(CONFIG))) for text in configs]
    key = digest(["\0".join((found.module, *resolved, "", *files))])
    return Task(name, found.module, tuple(arguments), inputs, seed, key)


def check_steps(place: str, steps: Mapping[str, Step]) -> None:
    """Check steps that come from a file: their names become names of folders."""
    needs, known = {}, {*steps, "out", "seed"}
    for name, step in steps.items():
        if not re.fullmatch(r"\w+", name):
            raise InputError(f"{place}: {name!r} is not a name; use letters, digits and _")
        named = {found for text in (*step.run, *step.quick) for found in PLACEHOLDER.findall(text)}
        for one in sorted(named - known):
            raise InputError(f"{place}.{name}: {{{one}}} names no step{did_you_mean(one, known)}")
        needs[name] = named & steps.keys()
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise InputError(f"{place}: {' needs '.join(error.args[1])}") from error


@cache
def config_digest(path: str) -> str:
    """Digest the settings in a YAML file; comments and layout do not count."""
    return digest([repr(yaml.safe_load(Path(path).read_text(encoding="utf-8")))])


def load_yaml(path: str) -> Any:
    """Read a YAML file, by its path or by the name ``configs/...`` of one that ships with the package.

    Raises:
        InputError: If the file is not YAML, or fails :func:`~latentreward.core.settings.rewriting.check_yaml`.
    """
    file = Path(find_config(path))
    try:
        check_yaml(text := file.read_text(encoding="utf-8"))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise InputError(f"{path}: {one_line(error)}") from error
