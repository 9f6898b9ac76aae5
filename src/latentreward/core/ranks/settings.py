"""Settings of the processes of a command."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the processes that do the work, as for the trainer of ``latentreward fit``.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``auto``.
        devices: Number of devices per node, or a list of device indices; ``auto`` takes all. With ``cpu``, the number
            of processes, each with one thread.
        num_nodes: Number of nodes; start the processes by torchrun or SLURM.
        strategy: ``auto``, or ``ddp`` for several processes.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
