"""Callback that groups curves in TensorBoard, and marks where a resumed run goes on."""

from collections.abc import Iterable

from latentreward.callbacks.bands import NoiseBandAccuracy, TimestepBands
from latentreward.callbacks.hacking_monitor import HackingMonitor
from latentreward.callbacks.prompt_monitor import ReferenceDrift
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from latentreward.alignment import AlignmentModule
from latentreward.reward.modules.reward import PairModule

Charts = Iterable[tuple[str, str, bool]]
"""Charts of a group: title, regular expression of the names of the curves, and whether the run logs such curves."""


class TensorBoardCharts(Callback):
    """Callback that groups related curves on TensorBoard's page *Custom Scalars*.

    Reward models get the group *Accuracy by noise level*, alignment with rollouts *Kept for training*, and a run with
    ``HackingMonitor`` or ``ReferenceDrift`` *Reward hacking*. ``NoiseBandAccuracy`` and ``TimestepBands`` add charts
    and curves.

    In a resumed run the callback marks the optimiser step in the log, so that TensorBoard drops later points of the
    interrupted run, which are logged again. The command ``fit`` adds the callback if a logger is TensorBoard's.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write groups and mark; other loggers than TensorBoard's are left alone."""
        groups = chart_groups(trainer, pl_module)
        for log in trainer.loggers:
            if not isinstance(log, TensorBoardLogger) or not trainer.is_global_zero:
                continue
            if trainer.global_step:
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog

                # Points of this very step stay: a validation or a monitor may have logged them before the checkpoint.
                started = SessionLog(status=SessionLog.START)
                log.experiment.file_writer.add_event(Event(step=trainer.global_step + 1, session_log=started))
            if groups:
                log.experiment.add_custom_scalars(groups)


def chart_groups(trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, list[object]]]:
    """Return the groups of charts of a run, as ``SummaryWriter.add_custom_scalars`` takes them."""

    def has(kind: type[Callback]) -> bool:
        return any(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    pairs = isinstance(pl_module, PairModule)
    rollouts = isinstance(pl_module, AlignmentModule) and pl_module.experience is not None
    bands, steps, watched = has(NoiseBandAccuracy), has(TimestepBands), has(HackingMonitor)
    drift = has(ReferenceDrift)
    groups: dict[str, Charts] = {
        "Accuracy by noise level": (
            ("accuracy at each evaluation level", r"val/accuracy(_t[\d.]+|_sigma[\d.]+)?$", pairs),
            ("accuracy by band of the noise level", r"val/accuracy_sigma_", bands),
            ("accuracy by band of the noise level, in training", r"train/accuracy_sigma_", bands),
            ("calibration error at each evaluation level", r"val/calibration(_t[\d.]+|_sigma[\d.]+)?$", pairs),
        ),
        "Kept for training": (
            ("share of candidates kept, by timestep", r"rollout/kept_share", rollouts),
            ("median gap of the candidates' scores, by timestep", r"rollout/gap_50_t_", rollouts and steps),
            ("mean score, and that of each reward", r"rollout/(score|reward_\d+)$", rollouts),
        ),
        "Reward hacking": (
            ("change from the reference, in standard errors", r"hacking/.*_change$", watched),
            ("held-out score", r"hacking/held_out$", watched),
            ("reward", r"hacking/reward$", watched),
            ("distance from the reference", r"drift/", drift),
        ),
    }
    shown: dict[str, dict[str, list[object]]] = {
        name: {title: ["Multiline", [curves]] for title, curves, logged in charts if logged}
        for name, charts in groups.items()
    }
    return {name: charts for name, charts in shown.items() if charts}
