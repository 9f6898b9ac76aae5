"""Rows of the reproduction, read from YAML: what runs for each arm and seed, what is measured, and what is claimed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from latentreward.apps.steps.tasks import Arguments, Step, Task, check_steps, load_yaml, resolve
from latentreward.errors import InputError, did_you_mean
from latentreward.settings.rewriting import shipped_configs
from latentreward.storage.digests import digest
from latentreward.storage.json_files import STRICT, checked

FOLDER, SHARED = "reproduce/", "reproduce/shared/steps.yaml"
Kind = Literal["accuracy", "alignment", "quality", "followed", "kept", "turned", "column"]
Paper = Literal["LRM", "LPO", "DiNa-LRM", "Later methods", "Edits", "Tiny world"]
MOST_SEEDS = 10


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
    ranks it, among pairs that differ in it; ``turned``: 1 for a pair whose ranking differs from that at the first level of the table; ``column``: the value of a
    column of pictures. Of several timesteps, noise levels or columns, scores are averaged.
    """

    __pydantic_config__ = STRICT
    of: str  # name of the step that wrote the scores
    kind: Kind
    timestep: Annotated[tuple[int | float, ...], BeforeValidator(_several)] = ()
    sigma: Annotated[tuple[int | float, ...], BeforeValidator(_several)] = ()
    column: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()


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
    seeds: int = 3  # without claims one is enough
    rewards: Sequence[str] = ()  # steps that train rewards; the page has their processor time in a column of its own
    steps: Mapping[str, Step] = field(default_factory=dict)  # of this row alone, in addition to the shared ones

    @cached_property
    def all_steps(self) -> dict[str, Step]:
        """The row's own steps and the shared ones by name."""
        return {**shared_steps(), **self.steps}

    def read_step(self, arm: str, metric: Metric) -> str:
        """Return the name of the step that a metric reads in an arm."""
        return self.instead.get(arm, {}).get(metric.of, metric.of)

    def reward_tasks(self, arm: str, seed: int) -> set[str]:
        """Return the keys of the tasks that train the rewards of an arm."""
        tables = [self.task(arm, self.read_step(arm, metric), seed) for metric in self.metrics.values()]
        return {task.key for table in tables for task in table.needed() if task.name in self.rewards}

    def task(self, arm: str, step: str, seed: int, quick: bool = False) -> Task:
        """Resolve a step of an arm for a seed; ``quick`` adds the arguments of a trial of two steps."""
        return resolve(self.all_steps, step, seed, self.arms[arm], quick)

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


@cache
def shared_steps() -> dict[str, Step]:
    """Read the steps that all rows may use."""
    found: dict[str, Step] = checked(dict[str, Step], load_yaml(f"configs/{SHARED}"), SHARED)
    return found


@cache
def all_rows() -> Mapping[str, Row]:
    """Read all shipped rows by name."""
    names = [name for name in shipped_configs() if name.startswith(FOLDER) and name.count("/") == 1]
    rows = [read_row(Path(name).stem, load_yaml(f"configs/{name}")) for name in names]
    return {row.name: row for row in rows}


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
    row: Row = checked(Row, {"name": name, **content}, f"{name}: ")
    _check(row)
    return row


def _check(row: Row) -> None:
    least = 3 if row.claims else 1
    if not least <= row.seeds <= MOST_SEEDS:
        raise InputError(f"{row.name}: seeds={row.seeds}; use {least} to {MOST_SEEDS}, so that claims have intervals")
    for arm, options in row.arms.items():
        _known(f"{row.name}: arms.{arm}", options, row.all_steps)
        changed = {
            one: replace(row.all_steps[one], run=(*row.all_steps[one].run, *more)) for one, more in options.items()
        }
        check_steps(f"{row.name}: arms.{arm}", {**row.all_steps, **changed})
    for arm, steps in row.instead.items():
        _known(f"{row.name}: instead", [arm], row.arms)
        _known(f"{row.name}: instead.{arm}", steps.values(), row.all_steps)
    for name, step in row.all_steps.items():
        _known(f"{row.name}: steps.{name}.pairs", [step.pairs] if step.pairs else [], row.all_steps)
    _known(f"{row.name}: rewards", row.rewards, row.all_steps)
    for name, metric in row.metrics.items():
        _known(f"{row.name}: metrics.{name}.of", [metric.of], row.all_steps)
    for index, claim in enumerate(row.claims):
        for side in (claim.higher, *([claim.lower] if claim.lower else [])):
            _known(f"{row.name}: claims[{index}]", [side.arm], row.arms)
            _known(f"{row.name}: claims[{index}]", [side.metric], row.metrics)


def _known(place: str, names: Collection[str], choices: Collection[str]) -> None:
    for name in names:
        if name not in choices:
            raise InputError(f"{place}: there is no {name!r}{did_you_mean(str(name), map(str, choices))}")
