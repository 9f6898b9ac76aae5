"""``latentreward pilot``: train a reward from a cut of a data set, and align a generator with it, on one card."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from latentreward.apps.estimate.card import Card
from latentreward.apps.pilot.checks import GB, check_access, check_disk, check_sources, downloads, hub_cache
from latentreward.apps.pilot.plans import ALIGNED, BESIDE, CUT, JUDGED, MEASURED, Pilot, find_pilot
from latentreward.apps.steps.tasks import Task
from latentreward.contracts import PathText
from latentreward.errors import InputError, check_at_least_one, errors_at
from latentreward.interrupts import interrupts_told
from latentreward.settings.functions import run_function
from latentreward.storage.hub import is_hub_id
from latentreward.storage.locks import locked


def pilot(
    name: PathText,
    *,
    pairs: int | None = None,
    seed: int = 0,
    check: bool = False,
    quick: bool = False,
    hours: float = 72.0,
    weights: str | None = None,
    output: Path | None = None,
    results: Path = Path("pilots"),
    work: Path = Path("runs/pilot"),
    **card: Any,
) -> None:
    """Cache a cut of a data set, train a reward, benchmark it, align a generator with it, compare before and after.

    First the licences are listed, and the disk, memory and hours that are needed are computed; nothing is downloaded
    before all of it suffices. The same command goes on after any stop. A changed setting starts the stages that depend
    on it again, in folders of their own. The result is one JSON file; `latentreward configs pilot` lists the pilots.

    Examples: ``latentreward pilot sd15 --check``, ``latentreward pilot sd35m --pairs 5000``,
    ``latentreward pilot sd_tiny`` (on a CPU, without any download).

    Args:
        name: Pilot to run: sd15, sd35m, sd_tiny, sd35_tiny, or a YAML file of your own.
        pairs: Number of pairs to train on, a fixed random cut of the training set; by default that of the pilot.
        seed: Seed of the cut, of the trainings and of the pictures.
        check: Whether to end after the checks.
        quick: Whether to only try all stages, with a few pairs, steps and pictures.
        hours: Most hours that the two trainings may take by the computed operations; a longer pilot is refused.
        weights: Hub id under which the trained reward was published, owner/name; it gets a row in the table of models.
        output: File of the result; ``NAME-DIGEST.json`` in ``results`` by default.
        results: Folder of the results.
        work: Folder of the stages' outputs.
        card: See :class:`~latentreward.apps.estimate.card.Card`; ``card_gb`` is for ``--check``.

    Raises:
        InputError: If something that is needed is missing, or a stage fails.
    """
    check_at_least_one(pairs=pairs)
    if weights is not None and not is_hub_id(weights):
        raise InputError(f"weights is {weights!r}; give the hub id of the pilot's reward, owner/name")
    found = find_pilot(name)
    compared = Card(found.device == "gpu", **card)
    if compared.card_gb is not None and not check:
        raise InputError(
            f"card_gb: {compared.card_gb} is for --check; leave it out, since the pilot runs on the GPU here"
        )
    settings = {"pairs": pairs or found.pairs, "seed": seed, "quick": quick}
    tasks, folder = found.tasks(**settings), work.resolve()
    values, lacking = found.values(), list[str]()
    for variable, source in found.sources.items():
        place = f"{variable}={values[variable]}" if variable in values else f"{variable} (not set)"
        print(f"{place}: {source.data or 'model'}; licence: {source.licence}", flush=True)
    with collected(lacking):
        check_sources(found)
    missing = downloads(found)
    with collected(lacking):
        check_access(found, missing)
    fetched = {hub_cache(): int(sum(one.gigabytes for one in missing.values()) * GB)} if missing else {}
    with collected(lacking):
        check_disk({**fetched, folder: 0})
    if check or not lacking:
        check_trainings(found, tasks, folder, settings["pairs"], (compared, hours), fetched, lacking)
    if lacking:
        raise InputError("; ".join(lacking))
    if check:
        return
    name_of_result = f"{found.name}-{found.digest(**settings)[:8]}.json"
    path = output or (work / "quick" if quick else results) / name_of_result  # nobody should send a trial's
    # These import Lightning and diffusers.
    from latentreward.apps.pilot.results import collect, write_result
    from latentreward.apps.steps.running import TaskRunner, run_tasks
    from latentreward.reports.report import HTML

    kept = f"what is done is kept in {work}: the same command goes on"
    with locked(folder, "work"), interrupts_told(lambda: kept):
        runner = TaskRunner(folder)
        if not all(map(runner.done, tasks.values())):
            run_tasks(tasks.values(), runner)
        write_result(path, replace(collect(found, tasks, runner, settings), weights=weights or ""))
    for title, stage, file in (
        ("published checkpoint", BESIDE, HTML),
        ("reward", MEASURED, HTML),
        ("adapter", ALIGNED, "lora"),
        ("before and after", JUDGED, HTML),
    ):
        print(f"{title}: {tasks[stage].output(folder) / file}")
    print(f"result: {path}")


@contextmanager
def collected(lacking: list[str]) -> Iterator[None]:
    """Append the line of an InputError to ``lacking``."""
    try:
        yield
    except InputError as error:
        lacking.append(str(error))


def check_trainings(
    found: Pilot,
    tasks: Mapping[str, Task],
    folder: Path,
    pairs: int,
    limits: tuple[Card, float],
    fetched: Mapping[Path, int],
    lacking: list[str],
) -> None:
    """Print and check the time, memory and disk that the trainings need which have not finished.

    ``fetched`` holds the bytes that will be downloaded, by folder; ``lacking`` gets a line about each missing thing.
    """
    # These import Lightning and diffusers.
    from latentreward.apps.commands.fit import estimate_fit
    from latentreward.apps.estimate.needs import check_gpu, check_hours, check_memory, training_needs
    from latentreward.apps.steps.running import TaskRunner

    card, most = limits
    if card.gpu and card.card_gb is None:
        with collected(lacking):
            check_gpu()
    runner = TaskRunner(folder)
    left = {name: task for name, task in tasks.items() if runner.done(task) is None}
    needs = {}
    for task in left.values():
        if task.arguments[0] == "fit":
            print(f"estimating {task.name}", flush=True)
            with collected(lacking), errors_at(f"estimate of {task.name}: "):
                needs[task.name] = training_needs(estimate_fit(task.command(folder)[1:]), pairs)
    written = sum(one.disk for one in needs.values()) + (2 * pairs * found.image_bytes if CUT in left else 0)
    if needs:
        with collected(lacking):
            print(check_hours(needs, card, most))
        smaller = "a copy of the pilot's file with a smaller --data.batch_size and more "
        remedy = f"take a machine with more, or {smaller}--trainer.accumulate_grad_batches"
        with collected(lacking):
            print(check_memory(needs, card, remedy))
    with collected(lacking):
        print("disk:", check_disk({**fetched, folder: written}), flush=True)


run = partial(run_function, pilot, classes=False)
