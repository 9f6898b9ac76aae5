"""Rows of the reproduction, read from YAML: what runs for each arm and seed, what is measured, and what is claimed."""

import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator

from latentreward.core.errors import InputError, did_you_mean, one_line
from latentreward.core.settings.rewriting import check_yaml, find_config
from latentreward.core.storage.digests import digest
from latentreward.core.storage.json_files import STRICT, checked
from tools.emoji.world import REMEDY, VARIABLE
from tools.measured import CLONE
from tools.reproduction.tasks import PLACEHOLDER, Step, Task, resolve

FOLDER = "reproduction/rows"
"""Folder of the rows in a clone; its folder ``shared`` has what several rows use."""
Kind = Literal["accuracy", "alignment", "quality", "followed", "kept", "turned", "column"]
Paper = Literal["LRM", "LPO", "DiNa-LRM", "Later methods", "Edits", "Tiny world", "Second world"]
LEAST_SEEDS, MOST_SEEDS = 3, 12
"""Fewest and most repetitions of a row by which its claims are judged."""
WHOLE = 10
"""First seed that is a whole repetition, with training pairs, noisy labels and training captions of its own.

Seeds below share these with each other: initialisation, order and noise are all that varies between them.
"""


@dataclass(frozen=True)
class Margin:
    """Largest difference of a metric that does not matter."""

    size: float
    of: str  # what the metric measures
    why: str  # why a smaller difference does not matter


MARGINS = {
    "pairs": Margin(0.02, "share of pairs: accuracy, ranked as a part of the utility, turned", "one pair in fifty"),
    "utility": Margin(
        0.1,
        "utility of pictures, 0 to 6",
        "a third of the gap above which two pictures count as clearly different, or one more wrong attribute in eight "
        "pictures",
    ),
    "alignment": Margin(0.025, "alignment of pictures, 0 to 1", "it changes the utility by 0.1"),
    "quality": Margin(0.05, "quality of pictures, 0 to 1", "it changes the utility by 0.1"),
    "followed": Margin(0.05, "share of edits that follow the instruction", "it changes the utility by 0.1"),
    "kept": Margin(0.05, "kept share of what an edit should leave alone", "it changes the utility by 0.1"),
    "held_out": Margin(0.01, "score of the held-out scorer", "a third of what ReFL adds to it (row `dina_refl`)"),
}
"""Margins of shares of pairs, and of the columns of pictures that claims are about."""


def split(given: Any) -> tuple[str, ...]:
    """Split the arguments of a process, which a YAML file holds as one text, with a shell's quotes."""
    if not isinstance(given, str):
        raise ValueError("it must be a text")
    return tuple(shlex.split(given))


Arguments = Annotated[tuple[str, ...], BeforeValidator(split)]
"""Arguments of a process."""


def _several(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else (given,)


def _with_sides(given: Any) -> Any:
    """Write a claim in full: ``by`` names the metric of sides that are given as the name of an arm."""
    metric = given.pop("by", None)
    sides = {name: given[name] for name in ("higher", "lower") if isinstance(given.get(name), str)}
    return given | {name: {"arm": arm, "metric": metric} for name, arm in sides.items()}


@dataclass(frozen=True)
class Metric:
    """Quantity that is measured for each held-out item; its mean over items is the number in tables.

    Kinds are ``accuracy``: 1 for a pair ranked as its utilities rank it, among pairs with clearly different utilities;
    ``alignment``, ``quality``, and of edits ``followed``, ``kept``: 1 for a pair ranked as this part of the utility
    ranks it, among pairs that differ in it; ``turned``: 1 for a pair whose ranking differs from that at the first level
    of the table; ``column``: the value of a column of pictures. Of several timesteps, noise levels or columns, scores
    are averaged.
    """

    __pydantic_config__ = STRICT
    of: str  # name of the step that wrote the scores
    kind: Kind
    timestep: Annotated[tuple[int | float, ...], BeforeValidator(_several)] = ()
    sigma: Annotated[tuple[int | float, ...], BeforeValidator(_several)] = ()
    column: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()

    @property
    def margin(self) -> Margin | None:
        """Margin of claims about the metric; None if there is none for its column."""
        return MARGINS.get(self.column[0] if self.kind == "column" else "pairs")


@dataclass(frozen=True)
class Side:
    """Arm and metric of one side of a claim."""

    __pydantic_config__ = STRICT
    arm: str
    metric: str


@dataclass(frozen=True)
class Claim:
    """Statement that one number exceeds another."""

    __pydantic_config__ = STRICT
    says: str  # the statement in words
    higher: Side  # side that should be higher
    lower: Side | None = None  # side that should be lower; None compares ``higher`` with ``more_than`` alone
    more_than: float = 0.0  # difference that should be exceeded


@dataclass(frozen=True)
class RowStep(Step):
    """Step of rows, with what a whole repetition adds."""

    __pydantic_config__ = STRICT
    run: Arguments
    quick: Arguments = ()  # arguments added for a trial of two steps
    pairs: str = ""  # name of the step that wrote the pairs which the step scores; empty if it scores no pairs
    # Arguments that draw the training data by {seed}; by default those of a `fit` on the tiny world's captions.
    repeat: Arguments | None = None

    @property
    def repeated(self) -> "RowStep":
        """The step of a whole repetition."""
        drawn = ("--data.data_seed={seed}",) if self.run[0] == "fit" else ()
        return replace(self, run=(*self.run, *(drawn if self.repeat is None else self.repeat)))


@dataclass(frozen=True)
class Row:
    """Row of the reproduction: arms that are compared on the same held-out items, once per seed."""

    __pydantic_config__ = STRICT
    name: str  # of the YAML file
    title: str  # heading on the page
    paper: Paper  # paper that the claims are from; the page has a section for each
    claim: str  # what is claimed, and where: paper and table, or that the comparison is ours
    run: str  # what was run: what the arms are, and what differs from the paper
    metrics: Mapping[str, Metric]  # name → metric; measured for every arm
    # Name of an arm → name of a step → arguments added to the step.
    arms: Mapping[str, Annotated[Mapping[str, Arguments], BeforeValidator(lambda given: given or {})]]
    cpu_seconds: float  # expected processor time of all seeds, without steps that other rows share
    claims: Sequence[Annotated[Claim, BeforeValidator(_with_sides)]] = ()  # statements to test
    # Name of an arm → name of a metric's step → name of the step that the arm has in its place.
    instead: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    miniature_of: Sequence[str] = ()  # full-size configs that the arms stand for
    result: str = ""  # what came out, in words, and why if known; empty before the measurement
    seeds: int = 3  # planned first, more may follow by `--budget`; without claims one is enough
    once: bool = False  # whether claims are judged once, at `seeds` whole repetitions, after another row's first look
    rewards: Sequence[str] = ()  # steps that train rewards; the page has their processor time in a column of its own
    steps: Mapping[str, RowStep] = field(default_factory=dict)  # of this row alone, in addition to the shared ones
    world: Literal["", "emoji"] = ""  # pictures in place of the drawn shapes; steps of its file replace shared ones
    like: str = ""  # row whose content, without its result, is that of this row where this one has none

    @cached_property
    def all_steps(self) -> dict[str, RowStep]:
        """The row's own steps and the shared ones by name."""
        return {**shared_steps(self.world), **self.steps}

    @property
    def lacks(self) -> str:
        """What there must be before the row can be measured, in one line; empty if there is all."""
        return REMEDY if self.world and VARIABLE not in os.environ else ""

    @cached_property
    def repeated_steps(self) -> dict[str, RowStep]:
        """The same steps of a whole repetition."""
        return {name: step.repeated for name, step in self.all_steps.items()}

    def read_step(self, arm: str, metric: Metric) -> str:
        """Return the name of the step that a metric reads in an arm."""
        return self.instead.get(arm, {}).get(metric.of, metric.of)

    def reward_tasks(self, arm: str, seed: int) -> set[str]:
        """Return the keys of the tasks that train the rewards of an arm."""
        tables = [self.task(arm, self.read_step(arm, metric), seed) for metric in self.metrics.values()]
        return {task.key for table in tables for task in table.needed() if task.name in self.rewards}

    def task(self, arm: str, step: str, seed: int, quick: bool = False) -> Task:
        """Resolve a step of an arm for a seed; ``quick`` adds the arguments of a trial of two steps."""
        steps, more = self.repeated_steps if seed >= WHOLE else self.all_steps, self.arms[arm]
        changed = {
            name: replace(one, run=(*one.run, *more.get(name, ()), *(one.quick if quick else ())))
            for name, one in steps.items()
        }
        return resolve(changed, step, seed)

    def tables(self, seed: int, quick: bool = False) -> dict[tuple[str, str], tuple[Task, Task | None]]:
        """Return (arm, step of a metric) → task that writes the scores, and task that wrote the scored pairs if any."""
        found = {}
        for arm in self.arms:
            for metric in self.metrics.values():
                step = self.read_step(arm, metric)
                pairs = self.all_steps[step].pairs
                scored = self.task(arm, pairs, seed, quick) if pairs else None
                found[arm, metric.of] = (self.task(arm, step, seed, quick), scored)
        return found

    def tasks(self, seed: int, quick: bool = False) -> dict[str, Task]:
        """Return all tasks of a seed by key, dependencies first."""
        lasts = (last for pair in self.tables(seed, quick).values() for last in pair if last)
        return {task.key: task for last in lasts for task in last.needed()}

    def config_digest(self, seed: int) -> str:
        """Digest everything but source files that the numbers of a seed depend on; wording and claims do not count."""
        tables = {place: [task and task.key for task in tasks] for place, tasks in self.tables(seed).items()}
        return digest([repr((sorted(tables.items()), sorted(self.metrics.items())))])


def check_steps(place: str, steps: Mapping[str, RowStep]) -> None:
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


def load_yaml(path: str) -> Any:
    """Read a YAML file, by its path or by the name ``configs/...`` of one that ships with the package."""
    file = Path(find_config(path))
    try:
        check_yaml(text := file.read_text(encoding="utf-8"))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise InputError(f"{path}: {one_line(error)}") from error


def file_of(name: str) -> str:
    """Return the path of a YAML file in the folder of the rows."""
    return str(CLONE / FOLDER / f"{name}.yaml")


@cache
def shared_steps(world: str = "") -> dict[str, RowStep]:
    """Read the steps that all rows of a world may use; without a name, of the drawn shapes."""
    found = dict[str, RowStep]()
    for name in ("steps", *([world] if world else [])):
        found |= checked(dict[str, RowStep], load_yaml(file_of(f"shared/{name}")), f"{name}.yaml")
    return found


@cache
def all_rows() -> Mapping[str, Row]:
    """Read all rows of this clone by name."""
    return {path.stem: read_row(path.stem, load_yaml(str(path))) for path in sorted((CLONE / FOLDER).glob("*.yaml"))}


def choose_rows(names: Sequence[str]) -> list[Row]:
    """Return the named rows; all rows without names.

    Raises:
        InputError: If a row does not exist.
    """
    rows = all_rows()
    for name in names:
        if name not in rows:
            raise InputError(f"names: there is no row {name!r}{did_you_mean(name, rows)}")
    return [rows[name] for name in names or rows]


def read_row(name: str, content: Mapping[str, Any]) -> Row:
    """Check the content of a row's YAML file.

    Raises:
        InputError: If a setting is unknown, missing or wrong, or a name that it uses does not exist.
    """
    if "like" in content:
        other = {key: value for key, value in load_yaml(file_of(content["like"])).items() if key != "result"}
        content = {**other, "paper": "Second world", **content}
    row: Row = checked(Row, {"name": name, **content}, f"{name}: ")
    _check(row)
    return row


def _check(row: Row) -> None:
    least = LEAST_SEEDS if row.claims else 1
    if not least <= row.seeds <= MOST_SEEDS:
        raise InputError(f"{row.name}: seeds={row.seeds}; use {least} to {MOST_SEEDS}, so that claims have intervals")
    for arm, options in row.arms.items():
        _known(f"{row.name}: arms.{arm}", options, row.all_steps)
        steps = row.repeated_steps
        changed = {one: replace(steps[one], run=(*steps[one].run, *more)) for one, more in options.items()}
        check_steps(f"{row.name}: arms.{arm}", {**steps, **changed})
    for arm, others in row.instead.items():
        _known(f"{row.name}: instead", [arm], row.arms)
        _known(f"{row.name}: instead.{arm}", others.values(), row.all_steps)
    for name, step in row.all_steps.items():
        _known(f"{row.name}: steps.{name}.pairs", [step.pairs] if step.pairs else [], row.all_steps)
    _known(f"{row.name}: rewards", row.rewards, row.all_steps)
    for name, metric in row.metrics.items():
        _known(f"{row.name}: metrics.{name}.of", [metric.of], row.all_steps)
    for index, claim in enumerate(row.claims):
        for side in (claim.higher, *([claim.lower] if claim.lower else [])):
            _known(f"{row.name}: claims[{index}]", [side.arm], row.arms)
            _known(f"{row.name}: claims[{index}]", [side.metric], row.metrics)
        if row.metrics[claim.higher.metric].margin is None:
            raise InputError(f"{row.name}: claims[{index}]: {claim.higher.metric!r} has no margin; add one to MARGINS")


def _known(place: str, names: Collection[str], choices: Collection[str]) -> None:
    for name in names:
        if name not in choices:
            raise InputError(f"{place}: there is no {name!r}{did_you_mean(str(name), map(str, choices))}")
