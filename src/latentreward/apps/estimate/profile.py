"""Profile of a run's steps: seconds by phase as measured, beside what bounds them, as a table and a picture."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

from latentreward.apps.estimate.needs import bounds_table
from latentreward.callbacks import Performance
from latentreward.callbacks.resumed_settings import log_folder
from latentreward.core.errors import InputError, check_at_least_one
from latentreward.core.peak_rates import Limits, Work, work_of
from latentreward.core.reports.tables import NOTHING, as_text, markdown_table
from latentreward.core.running import PHASES

WARM_UP = 3
"""Optimiser steps before those that are measured. Work is counted in the first two, where blocks are not compiled."""
OF_ROLLOUTS = ("encode", "rollout", "reward")
"""Phases that are told per rollout where steps share rollouts."""


class CountedWork(TorchDispatchMode):
    """Dispatch mode that counts the work of real operators by the phase that ``phases`` ends with."""

    supports_higher_order_operators = True

    def __init__(self, phases: list[str]) -> None:
        super().__init__()
        self.phases = phases
        self.work: defaultdict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and count it; see :class:`TorchDispatchMode`."""
        result = func(*args, **(kwargs or {}))
        self.work[self.phases[-1]] += work_of(func, args, kwargs or {}, result)
        return result


class StepProfile(Callback):
    """Callback of ``fit --profile N`` that measures ``N`` optimiser steps after a warm-up, and ends the run.

    It prints the seconds of each phase, those measured and those that the limits of a card ask for at least, and writes
    them to ``profile.md`` and ``profile.png`` in the run's folder.

    Args:
        steps: Optimiser steps to measure.
        limits: Peak rates of the device; None takes those that ``Performance`` has found.

    Raises:
        InputError: If ``steps`` is below 1, or the run ends before as many are measured.
    """

    def __init__(self, steps: int, limits: Limits | None = None) -> None:
        check_at_least_one(profile=steps)
        self.steps, self.limits = steps, limits
        self._mode: CountedWork | None = None
        self._work: dict[str, Work] = {}
        self._step = self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, with the first rollout."""
        (performance,) = [one for one in trainer.callbacks if isinstance(one, Performance)]  # type: ignore[attr-defined]
        assert performance.times is not None
        self._times, self._step, self._first = performance.times, trainer.global_step, trainer.global_step
        self._times.counts = False
        self.limits = self.limits or performance.limits
        self._mode = CountedWork(self._times.open)
        self._mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """End to count, begin to measure, and end the run."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        done, work = self._step - self._first, self._mode.work if self._mode else {}
        if done == 1:  # a first step also makes the optimiser's state
            self._work = {name: work[name] for name in OF_ROLLOUTS if "rollout" in work and name in work}
            work.clear()
        elif done == 2:
            self._work = {**work, **self._work}
            self._stop_counting()
        elif done in (WARM_UP, WARM_UP + self.steps):
            if self._times.cuda:
                torch.cuda.synchronize()
            self._times.read()
            if done > WARM_UP:
                self._tell(trainer)
                trainer.should_stop = True
            self._times.restart()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise InputError if the run has ended early."""
        self._stop_counting()
        if (done := self._step - self._first) < WARM_UP + self.steps:
            raise InputError(
                f"profile: {self.steps} steps after a warm-up of {WARM_UP}, but the run ended after {done}; give "
                "fewer, or let trainer.max_steps and max_epochs allow more"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End to count."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _tell(self, trainer: Trainer) -> None:
        """Print the table, and write it and the picture."""
        rollouts, steps = self._times.rollouts, self._times.steps
        shared = OF_ROLLOUTS if "rollout" in self._work and rollouts != steps else ()
        seconds = {
            name: total / (rollouts if name in shared else steps)
            for name, total in self._times.seconds.items()
            if rollouts or name not in shared
        }
        names = [name for name in PHASES if name in seconds or name in self._work]
        work = {name: self._work.get(name, Work()) for name in names}
        rows = {f"  {name}, a rollout" if name in shared else f"  {name}": work[name] for name in names}
        in_step = [name for name in names if name not in shared]
        rows["a step"] = sum((work[name] for name in in_step), Work())
        seconds["a step"] = sum(seconds[name] for name in in_step)
        measured = [f"{seconds[name]:.4f}" if name in seconds else NOTHING for name in (*names, "a step")]
        table = bounds_table(f"{steps} steps", rows, self.limits, {"measured, s": measured})
        folder = log_folder(trainer)  # a collective call
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.md").write_text(f"{markdown_table(table)}\n", encoding="utf-8")
        draw(work, seconds, self.limits).savefig(folder / "profile.png")
        print(as_text(table), f"table and picture: {folder / 'profile.md'}, profile.png", sep="\n", flush=True)


def draw(work: Mapping[str, Work], seconds: Mapping[str, float], limits: Limits | None) -> Figure:
    """Draw the measured seconds of each phase, beside the three bounds where ``limits`` are known."""
    bars = {"measured": [seconds.get(name, 0.0) for name in work]}
    for bound in ("arithmetic", "traffic", "launches") if limits else ():
        bars[bound] = [limits.bounds(one)[bound] for one in work.values()]
    figure = Figure(figsize=(8, 1 + 0.5 * len(work)), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(bars.items()):
        axes.barh([place + 0.2 * number for place in range(len(work))], values, height=0.18, label=name)
    axes.set_yticks([place + 0.1 * (len(bars) - 1) for place in range(len(work))], [*work])
    axes.set_xlabel("seconds of an optimiser step; encode, rollout and reward: of a rollout, where steps share one")
    axes.invert_yaxis()
    axes.legend()
    return figure
