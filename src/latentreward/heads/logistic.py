"""A bounded score from an unbounded one."""

import torch
from torch import Tensor, nn


class LogisticSquash(nn.Module):
    r"""``4 / (1 + exp(−(x − η₃) / (|η₄| + 10⁻⁶))) − 2``, in (−2, 2): DiNa-LRM's ``use_logistic``.

    Args:
        eta3: Initial midpoint; trains.
        eta4: Initial width; trains.

    Note:
        The published files do not hold η₃ and η₄, so a loaded model has the initial values. The released form's
        gradient is NaN for x far below η₃ (exp overflows); this one uses the sigmoid.
    """

    def __init__(self, eta3: float = 0.0, eta4: float = 0.15) -> None:
        super().__init__()
        self.eta3 = nn.Parameter(torch.tensor(eta3))
        self.eta4 = nn.Parameter(torch.tensor(eta4))

    def forward(self, x: Tensor) -> Tensor:
        """Squash any shape."""
        return 4 * torch.sigmoid((x - self.eta3) / (self.eta4.abs() + 1e-6)) - 2
