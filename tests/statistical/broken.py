"""Faults of a trainer, put into a module in memory for as long as it trains: ``with FAULTS[name](module): ...``."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from latentreward.alignment import LPOModule, StepDPOResult
from latentreward.core.contracts import PairScores, StepPairs

Fault = Callable[[Any], AbstractContextManager[Any]]


def flipped_loss(module: LightningModule) -> AbstractContextManager[Any]:
    """The sign of the loss is wrong."""
    forward = module.loss.forward

    def flipped(*scores: Any) -> Tensor | StepDPOResult:
        loss = forward(*scores)
        return loss._replace(loss=-loss.loss) if isinstance(loss, StepDPOResult) else -loss

    return patch.object(module.loss, "forward", flipped)


def half_exchanged(module: LightningModule) -> AbstractContextManager[Any]:
    """Chosen and rejected are exchanged in every other pair."""
    if isinstance(module, LPOModule):
        compare = module.compare
        return patch.object(module, "compare", lambda batch: compare(exchange(batch)))
    score = module.score
    return patch.object(module, "score", lambda *batch, **options: exchange(score(*batch, **options)))


def exchange(pairs: Any) -> PairScores | StepPairs:
    """Exchange the two sides of every other pair."""
    first = pairs.chosen.clone(), pairs.rejected.clone()
    chosen, rejected = first
    chosen[::2], rejected[::2] = pairs.rejected[::2], pairs.chosen[::2]
    return replace(pairs, chosen=chosen, rejected=rejected)


def wrong_timestep(module: LPOModule) -> AbstractContextManager[Any]:
    """The network is told 1000 − t in place of t, in rollouts and in training."""
    predict = module.policy.predict
    return patch.object(module.policy, "predict", lambda latents, t, *rest: predict(latents, 1000 - t, *rest))


def no_reference(module: LPOModule) -> AbstractContextManager[Any]:
    """The adapter stays on where the reference predicts."""
    return patch.object(module.policy, "reference", nullcontext)


def idle_lora(module: LightningModule) -> AbstractContextManager[Any]:
    """The adapter gets no gradient: the head, where there is one, learns alone."""
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.register_hook(torch.zeros_like)
    return nullcontext()


FAULTS: dict[str, tuple[str, Fault]] = {
    "LPO, sign of the loss": ("lpo", flipped_loss),
    "LPO, half of the pairs exchanged": ("lpo", half_exchanged),
    "LPO, wrong timestep": ("lpo", wrong_timestep),
    "LPO, reference not switched off": ("lpo", no_reference),
    "DiNa-LRM, sign of the loss": ("dina_lrm", flipped_loss),
}
"""Broken trainers that statistics should show: name → training and fault."""
