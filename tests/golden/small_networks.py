"""The networks of golden/algos2: two layers of weights that the case stores, over state, level and condition."""

from collections.abc import Mapping

import torch
from torch import Tensor


def weights_of(data: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of a network, as leaves."""
    return {key: data[f"{name}.{key}"].clone().requires_grad_() for key in ("w1", "b1", "w2", "b2")}


def output_of(weights: Mapping[str, Tensor], states: Tensor, levels: Tensor, condition: Tensor) -> Tensor:
    """w2·tanh(w1·[x, t, c] + b1) + b2 of states ``(B, C, ...)`` at levels ``(B,)``."""
    seen = torch.cat([states.flatten(1), levels[:, None], condition[:, None]], dim=1)
    hidden = (seen @ weights["w1"].T + weights["b1"]).tanh()
    return (hidden @ weights["w2"].T + weights["b2"]).view_as(states)
