"""Log of the rollouts of an alignment run: time, speed, scores."""

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from latentreward.core.contracts import RolloutStatistics


class RolloutLog(Callback):
    """Callback of every alignment module: logs each rollout with the first batch that follows it."""

    def __init__(self) -> None:
        self.part_means: list[float] = []  # mean score of each reward of a mixture, before normalisation
        self.began = self._seconds = 0.0
        self._times: dict[str, float] = {}
        self._seen: RolloutStatistics | tuple[()] | None = ()  # statistics that were logged; at first not even None

    def add_times(self, seconds: float, process_seconds: float) -> None:
        """Note the time that a rollout took, and that of the processor."""
        self._seconds += seconds
        self._times = {"seconds": seconds, "process_seconds": process_seconds}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.began, self._seconds = time.perf_counter(), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log the last rollout: time, speed, share of the run's time, scores, mean gap, share of rows kept."""
        # At the first batch after a rollout, and in steps that are logged: each value costs some kernels.
        seen, self._seen = self._seen, pl_module.rollout_statistics
        if seen is self._seen and not trainer._logger_connector.should_update_logs:
            return
        values = self._times | pl_module.rollout_values
        # A resumed run begins with rows in store, before any rollout of its own.
        if self._times:
            values["time_share"] = self._seconds / (time.perf_counter() - self.began)
        if (statistics := pl_module.rollout_statistics) is not None and statistics.gap.numel():
            mean = statistics.scores.float().mean().item()
            pl_module.log("rollout/score", mean, prog_bar=True, batch_size=len(batch))
            spread = statistics.scores.float().std(dim=1, correction=0)
            means = {"score_std": spread, "gap": statistics.gap, "kept_share": statistics.kept}
            values |= {name: value.float().mean().item() for name, value in means.items()}
            if values.get("seconds"):
                values["samples_per_second"] = statistics.scores.numel() / values["seconds"]
        values |= {f"reward_{number}": mean for number, mean in enumerate(self.part_means, 1)}
        pl_module.log_dict({f"rollout/{name}": value for name, value in values.items()}, batch_size=len(batch))
