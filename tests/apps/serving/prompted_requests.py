"""Requests with raw prompts, well-formed."""

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from latentreward.apps.serving.bodies import Accepted

TIMES = torch.tensor([900.0, 400.0, 20.0])


def latents_of(accepted: Accepted, *leading: int, side: int = 8, seed: int = 0) -> Tensor:
    """Random latents that a model takes, with leading axes."""
    time = () if accepted.frames is None else (accepted.frames,)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, accepted.channels, *time, side, side, generator=generator)


def body_of(tensors: Mapping[str, Tensor], prompts: Sequence[str] | str) -> bytes:
    """A body of ``/v1/score_latents`` or ``/v1/score_states``."""
    texts = {"prompt": prompts} if isinstance(prompts, str) else {"prompts": json.dumps([*prompts])}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=texts)
