"""DiNa-LRM's released losses as they are, epsilons included: what the recorded means, gradients and tails come from."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EPS = 1e-6


def released_ndtr(margin: Tensor, variance: Tensor | float) -> Tensor:
    z = margin / (variance + variance + EPS) ** 0.5
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def fidelity(margin: Tensor, variance: Tensor | float) -> Tensor:
    return 1 - torch.sqrt(released_ndtr(margin, variance) + EPS)


def nll(margin: Tensor, variance: Tensor | float) -> Tensor:
    return -torch.log(released_ndtr(margin, variance) + EPS)


def bradley_terry(margin: Tensor, lead: float = 0.0) -> Tensor:
    return -logsigmoid(margin - lead)
