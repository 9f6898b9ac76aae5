"""Callback that prints the number of parameters."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class ParameterSummary(ModelSummary):
    """Callback that prints one line: the number of parameters of each part of the model, and how many are trainable.

    The line replaces Lightning's table, whose FLOPs are 0 without an ``example_input_array``. The command line adds
    this callback to every fit, unless ``trainer.callbacks`` has a ``ModelSummary`` or ``trainer.enable_model_summary``
    is false.

    Args:
        max_depth: Levels of nested modules to list; 0 switches the line off.

    Example:
        ``--trainer.callbacks+=ParameterSummary --trainer.callbacks.max_depth=2``
    """

    def __init__(self, max_depth: int = 1) -> None:
        super().__init__(max_depth)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the line on rank 0; Lightning's ``ModelSummary`` calls this method with the columns of its table."""
        columns = dict(summary_data)
        rows = zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
        parts = [f"{name} ({kind}) {number.strip()}" for name, kind, number in rows if number.strip() != "0"]
        trained, total = (get_human_readable_count(n).strip() for n in (trainable_parameters, total_parameters))
        rank_zero_info(f"parameters: {', '.join(parts)}; {trained} of {total} train; {model_size:,.0f} MB")
