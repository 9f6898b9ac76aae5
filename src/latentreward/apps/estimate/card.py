"""Device that the needs of trainings are compared with."""

from dataclasses import dataclass

from latentreward.core.errors import check_range

GB = 10**9


@dataclass(frozen=True)
class Card:
    """Device with which an estimate compares the needs of trainings; options of ``fit`` and ``taste``.

    Attributes:
        gpu: Whether the trainings run on a GPU.
        card_gb: Memory of the card to compare with, in GB; by default that of the GPU here.
        tflops: Operations per second that the device sustains, in 10¹²; 30 is some 40 % of an RTX 3090's peak.

    Raises:
        InputError: If a number is not above 0.
    """

    gpu: bool
    card_gb: float | None = None
    tflops: float = 30.0

    def __post_init__(self) -> None:
        check_range("(0, inf)", card_gb=self.card_gb, tflops=self.tflops)

    def memory(self) -> tuple[int, str] | None:
        """Return bytes and name of the GPU's memory; None if there is no GPU here and none is given."""
        import torch

        if self.card_gb is not None:
            return int(self.card_gb * GB), "of GPU memory"
        if not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(0)
        return found.total_memory, f"of GPU memory ({found.name})"
