"""Measurement of a run's steps: seconds by phase, operations per second, and the share of the card's peak."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from functools import cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning.pytorch.profilers import Profiler

from latentreward.core.peak_rates import CountedFlops
from latentreward.core.running import LISTENER, PHASES, Phases

ASIDE = "aside"
"""Phase of what belongs to no step: validations and checkpoints."""


class Mark(NamedTuple):
    """Beginning of a phase: seconds of the host's clock, or an event of the card.

    At the end of an optimiser step, ``flops`` are its operations; elsewhere None.
    """

    phase: str
    time: Any
    flops: float | None


class StepTimes(Phases):
    """Seconds by phase and operations of training steps, from the beginning of a run.

    On a CUDA device each change of phase records an event, which costs some microseconds. Events are read when the
    card has passed them, so that nothing waits for the card. Elsewhere the host's clock is read. The phases follow each
    other without a gap: together they take the time of the steps, validations and checkpoints left out.

    Operations are counted by the operators of real batches, which is right for every module: of batches of each layout
    the first, second, fourth, eighth and so on, and so of rollouts; their mean stands for those between. A counted
    batch takes longer, by some microseconds for each operator.

    Args:
        cuda: Whether a CUDA device computes.
        peak_tflops: Peak of the device, in 10¹² operations per second; None if it is not known.

    Attributes:
        seconds: Seconds by phase of the optimiser steps that have ended since :meth:`restart`.
        steps: Number of these steps.
        flops: Operations of these steps.
        rollouts: Number of rollouts since then.
        counts: Whether operations are counted.
    """

    def __init__(self, cuda: bool, peak_tflops: float | None = None) -> None:
        super().__init__("log")
        self.cuda, self.peak_tflops, self.paused, self.counts = cuda, peak_tflops, False, True
        self._marks: deque[Mark] = deque()
        self._present: defaultdict[str, float] = defaultdict(float)  # seconds of the step that has not ended
        self._flops: float = 0  # operations of that step
        self._counting: tuple[Hashable, CountedFlops] | None = None
        self._counts: defaultdict[Hashable, list[Any]] = defaultdict(lambda: [0, 0, 0])  # batches, counted, their FLOPs
        self._mark()
        self.restart()

    def restart(self) -> None:
        """Forget the steps that have ended."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps, self.rollouts = 0, 0
        self.flops: float = 0

    def begin(self, name: str) -> None:
        """Begin a phase; one within the wait for data, such as a rollout, has operations of its own."""
        if self.open[-1] == "data_wait":
            self.start_counting(name)
        self.rollouts += name == "rollout"
        super().begin(name)
        self._mark()

    def end(self) -> None:
        """End the innermost phase."""
        if len(self.open) == 1:  # of an action that began before the measurement
            return
        super().end()
        self._mark()
        if self.open[-1] == "data_wait":
            self.stop_counting()

    def pause(self, paused: bool) -> None:
        """Begin or end a part of the run that belongs to no step."""
        self.paused = paused
        self._mark()

    def end_step(self) -> None:
        """End an optimiser step."""
        self._mark(self._flops)
        self._flops = 0

    def _mark(self, flops: float | None = None) -> None:
        name = ASIDE if self.paused else self.open[-1]
        if flops is not None or not self._marks or self._marks[-1].phase != name:
            now: Any = torch.cuda.Event(enable_timing=True) if self.cuda else perf_counter()
            if self.cuda:
                now.record()
            self._marks.append(Mark(name, now, flops))

    def read(self) -> None:
        """Add up the time between the marks that the device has passed."""
        while len(self._marks) > 1 and (not self.cuda or self._marks[1].time.query()):
            begun, ended = self._marks.popleft(), self._marks[0]
            self._present[begun.phase] += (
                begun.time.elapsed_time(ended.time) / 1000 if self.cuda else ended.time - begun.time
            )
            if ended.flops is not None:
                self._present.pop(ASIDE, None)
                for name in [*self._present]:
                    self.seconds[name] += self._present.pop(name)
                self.steps, self.flops = self.steps + 1, self.flops + ended.flops

    def start_counting(self, key: Hashable) -> None:
        """Begin a batch or rollout that takes as many operations as others with the same ``key``."""
        count = self._counts[key]
        count[0] += 1
        alike = [one for other, one in self._counts.items() if isinstance(other, str) == isinstance(key, str)]
        begun, counted, flops = map(sum, zip(*alike, strict=True))
        due = count[0] & (count[0] - 1) == 0 and counted <= 8 + begun / 16  # of very many layouts some are not counted
        if self.counts and self._counting is None and due:
            self._counting = key, CountedFlops()
            self._counting[1].__enter__()
        elif self._counting is None and counted:
            self._flops += count[2] / count[1] if count[1] else flops / counted

    def stop_counting(self) -> None:
        """End the batch or rollout, if it was counted."""
        if self._counting is not None:
            (key, mode), self._counting = self._counting, None
            mode.__exit__(None, None, None)
            self._flops += mode.flops
            _, counted, flops = self._counts[key]
            self._counts[key][1:] = counted + 1, flops + mode.flops

    def values(self) -> dict[str, float]:
        """Return seconds by phase of a step, and speed, of the steps since :meth:`restart`, by the names of the log."""
        total = sum(self.seconds.values())
        found = {f"time/{name}": self.seconds[name] / self.steps for name in PHASES if name in self.seconds}
        tflops = self.flops / total / 1e12
        found |= {"time/step": total / self.steps, "train/tflops_per_second": tflops}
        return found if self.peak_tflops is None else {**found, "train/mfu": tflops / self.peak_tflops}


@cache
def phase_of(action: str) -> str | None:
    """Return the phase that begins with an action of Lightning's profiler; None if the phase goes on."""
    place, _, hook = action.rpartition(".")
    if hook in ("train_dataloader_next", "batch_to_device"):
        return "data_wait"
    if place.startswith("[Callback]"):
        return "ema" if place.startswith("[Callback]TrainableEMA") else "log"
    if place.startswith("[Strategy]"):
        return {"training_step": "forward", "backward": "backward"}.get(hook)
    return {"optimizer_step": "optimizer", "save_checkpoint": ASIDE}.get(hook)


def listen(profiler: Profiler, times: StepTimes) -> None:
    """Let ``times`` follow the actions that Lightning tells its profiler, and the phases that a step names."""

    def start(own: Callable[[str], None], action: str) -> None:
        own(action)
        if (name := phase_of(action)) is not None:
            times.begin(name)

    def stop(own: Callable[[str], None], action: str) -> None:
        own(action)
        if action == "run_training_batch":  # what callbacks compute after it is no part of the step's operations
            times.stop_counting()
        if phase_of(action) is not None:
            times.end()

    profiler.start = partial(start, profiler.start)  # type: ignore[method-assign]
    profiler.stop = partial(stop, profiler.stop)  # type: ignore[method-assign]
    LISTENER.set(times)


def unlisten(profiler: Profiler) -> None:
    """Undo :func:`listen`."""
    LISTENER.set(None)
    for name in ("start", "stop"):
        vars(profiler).pop(name, None)
