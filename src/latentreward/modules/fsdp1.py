"""FSDP1's precision, in place of Lightning's, which neither takes our batches nor clips gradients by their norm."""

from typing import Any

from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer


class FSDP1Precision(FSDPPrecision):
    """Precision of FSDP1 that takes our batches, and clips gradients by their norm over all ranks.

    Args:
        plain: Lightning's precision of the run: 32-true, 16-mixed or bf16-mixed.
        strategy: Strategy of the run, which wraps the module later.
    """

    def __init__(self, plain: FSDPPrecision, strategy: FSDPStrategy) -> None:
        super().__init__(plain.precision, plain.scaler)
        self._strategy = strategy

    def convert_input(self, data: Any) -> Any:
        """Return a batch as it is: Lightning writes into records, which ours refuse, only to make float32 of them."""
        return data

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float, *_: Any, **__: Any) -> None:
        """Clip gradients by their norm over all ranks, which Lightning leaves to the user."""
        assert isinstance(self._strategy.model, FullyShardedDataParallel)
        self._strategy.model.clip_grad_norm_(clip_val)
