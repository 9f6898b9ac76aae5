"""What bounds a step on a card: arithmetic, memory traffic or launches, by phase; and the setting that helps most."""

from collections.abc import Iterator, Mapping, Sequence
from pydoc import locate
from types import MappingProxyType

from latentreward.apps.estimate.estimate import Estimate
from latentreward.apps.estimate.shapes import RECOMPUTE
from latentreward.apps.estimate.step_costs import TEXT
from latentreward.core.peak_rates import Limits, Work
from latentreward.core.reports.tables import Table, as_text
from latentreward.core.running import PHASES
from latentreward.data.datamodules import PairLoaders
from latentreward.diffusion import CachedPreferenceDataModule

COMPILED = 0.3
"""Part of a step's time that compiled blocks save: 0.12 to 0.5 in docs/performance.md."""


def bounds_table(
    title: str,
    rows: Mapping[str, Work],
    limits: Limits | None,
    columns: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Table:
    """Return a table of work by name and, with ``limits``, its bounds in seconds; further ``columns`` come last."""
    cells = []
    for number, (name, work) in enumerate(rows.items()):
        bounds = [] if limits is None else [f"{seconds:.4f}" for seconds in limits.bounds(work).values()]
        counts = f"{work.flops / 1e12:.4g}", f"{work.bytes / 1e9:.4g}", str(work.kernels)
        cells.append((name, *counts, *bounds, *(column[number] for column in columns.values())))
    headings = ("arithmetic, s", "traffic, s", "launches, s") if limits else ()
    return Table((title, "TFLOP", "GB", "kernels", *headings, *columns), tuple(cells))


def limits_text(found: Estimate, limits: Limits) -> str:
    """Format the bounds of a step and of a rollout, and name the setting that would help the step most."""
    costs, times = found.costs, found.accumulated
    rollout = costs.work.get("rollout", Work())
    phases = {name: work for name, work in costs.work.items() if name != "rollout"}
    if costs.freed and not issubclass(locate(found.settings.data.class_path), PairLoaders):  # type: ignore[arg-type]
        phases.pop("encode", None)  # EncodeOnce has encoded the prompts before the first step
    for name in phases.keys() - {"optimizer", "ema"}:  # of one batch
        phases[name] = Work(*(times * count for count in vars(phases[name]).values()))
    step = sum(phases.values(), Work())
    order = [*PHASES, RECOMPUTE]
    rows = {f"  {name}": phases[name] for name in sorted(phases, key=order.index) if phases[name].kernels}
    rows |= {"a step": step} | ({"a rollout": rollout} if rollout.kernels else {})
    bounds = limits.bounds(step)
    greatest = max(bounds, key=bounds.__getitem__)
    lines = [
        as_text(bounds_table(limits.name, rows, limits)),
        "Traffic as if no operators were fused, and 6 µs a launch: compiled blocks need less of both.",
        f"limit: {greatest}, at least {bounds[greatest]:.3g} s a step",
    ]
    gain, setting = max(remedies_of(found, phases, limits), default=(0.0, ""))
    if gain > 0.01 * bounds[greatest]:
        lines[-1] += f"; what would help most: {setting} ({gain:.2g} s less)"
    return "\n".join(lines)


def remedies_of(found: Estimate, phases: Mapping[str, Work], limits: Limits) -> Iterator[tuple[float, str]]:
    """Yield settings that would shorten a step of so much work by phase, each after the seconds that it saves."""
    settings, step = found.settings, sum(phases.values(), Work())
    bounds = sorted((seconds, name) for name, seconds in limits.bounds(step).items())
    (longest, greatest), (second, _) = bounds[2], bounds[1]

    def without(name: str) -> float:
        rest = sum((work for other, work in phases.items() if other != name), Work())
        return longest - max(limits.bounds(rest).values())

    kind: type = locate(settings.data.class_path)  # type: ignore[assignment]
    trains_text = any(part.name == TEXT and part.trained for part in found.costs.parts)
    if "encode" in phases and issubclass(kind, PairLoaders) and not issubclass(kind, CachedPreferenceDataModule):
        yield without("encode"), "cached latents (latentreward cache)"
    elif "encode" in phases and not trains_text:
        text = "--data.cached_text=true, of a cache with text" if issubclass(kind, PairLoaders) else "EncodeOnce"
        yield without("encode"), text
    if RECOMPUTE in phases:
        yield without(RECOMPUTE), "gradient_checkpointing: false, if the memory suffices"
    if greatest == "launches":
        yield longest - second, "a larger --data.batch_size: as many kernels for more rows"
    performance, steps = settings.performance, settings.trainer.max_steps
    itself = (
        performance.compile_blocks is None and performance.auto and (steps < 0 or steps >= found.costs.compiled_from)
    )
    if not (performance.compile_blocks or itself):
        yield COMPILED * longest, "--performance.compile_blocks=true"
