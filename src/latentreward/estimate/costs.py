"""Memory and computation of one training step of a module, and of what it samples before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from latentreward.contracts import NoisyStates, TensorRecord, map_tensors
from latentreward.encoders.prompts import PromptEncoder
from latentreward.encoders.vae import LatentEncoder
from latentreward.errors import InputError
from latentreward.estimate.batches import make_batch
from latentreward.estimate.shapes import CPU, SavedTensors, ShapesOnly, gpu_autocast, is_stand_in
from latentreward.heads import RewardHead
from latentreward.modules import ReFLModule
from latentreward.modules.alignment import RolloutModule
from latentreward.policies import Policy
from latentreward.rewards import Reward
from latentreward.rewards.latent import LatentScorer
from latentreward.rewards.pixel import DecodingReward, ImageReward
from latentreward.scorers.step_aware_clip import StepAwareCLIP

PARTS = {
    Reward: "reward",
    RewardHead: "head",
    StepAwareCLIP: "scorer",
    PromptEncoder: "text encoders",
    LatentEncoder: "VAE",
}
"""Class → name of its weights, those in a part of another class aside; weights of no such class are the network's."""


@dataclass(frozen=True)
class PartCosts:
    """Weights of one part of a module.

    Attributes:
        name: Name.
        parameters: Number of parameters.
        trained: Number of those that train.
        bytes: Size of parameters and buffers, as they are stored.
    """

    name: str
    parameters: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class StepCosts:
    """What a training step needs; sizes in bytes, computation in FLOPs.

    Attributes:
        parts: Weights.
        gradients: Size of the gradients.
        optimizer: Class of the optimiser.
        state: Size of its state.
        saved: Most that autograd keeps at any one time for the backward pass of one batch.
        batch_peak: Most that is alive in the passes of one batch, weights and optimiser state included.
        update_peak: Likewise while the optimiser changes the weights.
        rollout_peak: Likewise in a rollout; 0 without one.
        forward: Computation of one batch up to the loss, sampling aside.
        backward: Computation of its backward pass, blocks that are computed again included.
        rollout: Computation of a rollout; in ReFL, of sampling a batch up to where gradients begin.
    """

    parts: tuple[PartCosts, ...]
    gradients: int
    optimizer: str
    state: int
    saved: int
    batch_peak: int
    update_peak: int
    rollout_peak: int
    forward: int
    backward: int
    rollout: int

    @property
    def weights(self) -> int:
        """Size of all weights."""
        return sum(part.bytes for part in self.parts)

    @property
    def peak(self) -> int:
        """Most that is alive at any time."""
        return max(self.batch_peak, self.update_peak, self.rollout_peak)


class RepeatedCalls:
    """Leaves out calls without gradients that repeat an earlier one, and counts them all the same.

    Args:
        shapes: Where everything runs.

    Attributes:
        sampled: FLOPs of the policy in calls without gradients, those of the reference aside.
    """

    def __init__(self, shapes: ShapesOnly) -> None:
        self.shapes, self.sampled = shapes, 0
        self._seen: dict[Any, tuple[int, int, Any]] = {}

    def watch(self, owner: Any, method: str, state: Callable[[], Any] = tuple) -> None:
        """Compute ``owner.method`` once for arguments of one layout, as long as ``state`` is the same."""
        original, shapes, live = getattr(owner, method), self.shapes, self.shapes.live

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                return original(*arguments)
            key = id(owner), (working := state()), layout_of(arguments)
            if key in self._seen:
                flops, extra, layout = self._seen[key]
                shapes.flops += flops
                live.peak = max(live.peak, live.now + extra)
                result = map_tensors(layout, lambda tensor: shapes.stand_in(tensor.shape, tensor.dtype))
            else:
                flops, before, peak = shapes.flops, live.now, live.peak
                live.peak = before
                result = original(*arguments)
                flops = shapes.flops - flops
                layout = map_tensors(
                    result, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                )
                self._seen[key] = flops, live.peak - before, layout
                live.peak = max(live.peak, peak)
            if isinstance(owner, Policy) and working:
                self.sampled += flops
            return result

        setattr(owner, method, call)


def layout_of(value: Any) -> Any:
    """Shapes and types of all tensors in a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, TensorRecord):
        return tuple(layout_of(getattr(value, field.name)) for field in fields(value))  # type: ignore[arg-type]
    return tuple(map(layout_of, value)) if isinstance(value, tuple | list) else None


def step_costs(module: LightningModule, data: Namespace, accumulated: int = 1, gpu: bool = True) -> StepCosts:
    """Run one step of ``module`` without numbers.

    Args:
        module: On the meta device; it knows its trainer, on the CPU, and cannot be used afterwards.
        data: Class and settings of the data module.
        accumulated: Batches per optimiser step.
        gpu: Whether autocast and optimiser should hold as much memory as on a GPU.

    Raises:
        InputError: If the module or its optimiser is of a kind that is not known here.
    """
    shapes = ShapesOnly()
    calls, live = RepeatedCalls(shapes), shapes.live
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    shapes.replace_weights(module.train())
    module._device = CPU  # a LightningModule remembers where it was made, and its `to` would copy the weights
    watch_sampling(module, calls)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    with ExitStack() as stack:
        for context in (shapes, *([gpu_autocast()] if gpu else [])):
            stack.enter_context(context)
        optimizer = optimizer_of(module, foreach=gpu)
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        live.peak = live.now
        optimizer.step()
        update_peak = live.peak
        if accumulated == 1:
            optimizer.zero_grad()
        live.peak, before = live.now, shapes.flops
        batch = make_batch(module, data, shapes)
        rollout_peak, rollout = live.peak, shapes.flops - before
        live.peak, before, sampled = live.now, shapes.flops, calls.sampled
        with (saved := SavedTensors([*module.parameters(), *module.buffers()])):
            with module.trainer.precision_plugin.train_step_context():
                result = module.training_step(batch, 0)
            loss = (result["loss"] if isinstance(result, Mapping) else result) / accumulated
            del result, batch
        forward = shapes.flops - before
        loss.backward()
        backward = shapes.flops - before - forward
    if isinstance(module, ReFLModule):
        rollout = calls.sampled - sampled
        forward -= rollout
    return StepCosts(
        parts=part_costs(module),
        gradients=bytes_of(trained),
        optimizer=type(optimizer).__name__,
        state=bytes_of(value for state in optimizer.state.values() for value in state.values() if is_stand_in(value)),
        saved=saved.bytes.peak,
        batch_peak=live.peak,
        update_peak=update_peak,
        rollout_peak=rollout_peak if isinstance(module, RolloutModule) else 0,
        forward=forward,
        backward=backward,
        rollout=rollout,
    )


def watch_sampling(module: LightningModule, calls: RepeatedCalls) -> None:
    """Have the policy and the reward of an alignment module counted, and repeated calls left out."""
    policy, reward = getattr(module, "policy", None), getattr(module, "reward", None)
    if not isinstance(policy, Policy):
        return
    calls.watch(policy, "predict", lambda: policy.adapters.working)
    for part in module.modules():
        if isinstance(part, PromptEncoder):
            calls.watch(part, "forward")
    for part in () if reward is None else reward.modules():
        if isinstance(part, ImageReward):  # its scorer takes pictures, which have no shapes alone
            part.score = partial(decode_alone, part)  # type: ignore[method-assign]
        if isinstance(part, DecodingReward):
            calls.watch(part, "score")
        if isinstance(part, LatentScorer):
            calls.watch(part.model.backbone, "read", lambda: policy.adapters.working)


def decode_alone(reward: ImageReward, states: NoisyStates, encoded: Any) -> Tensor:
    """Decode the pictures that ``reward`` would score, and give a number for each."""
    return torch.cat(reward.decode(states)).mean(dim=(1, 2, 3))


def optimizer_of(module: LightningModule, foreach: bool) -> Optimizer:
    """The module's optimiser; ``foreach`` has it work on many weights at once, as it does by default on a GPU.

    Raises:
        InputError: If it has several, or none.
    """
    built: Any = module.configure_optimizers()
    optimizer = built.get("optimizer") if isinstance(built, Mapping) else built
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"--estimate knows modules with one optimiser, which {type(module).__name__} has not")
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def part_costs(module: LightningModule) -> tuple[PartCosts, ...]:
    """Weights by part, each once."""
    owners: dict[int, str] = {}
    for part in module.modules():  # outer ones first
        name = next((name for kind, name in PARTS.items() if isinstance(part, kind)), None)
        if name is not None:
            for weight in (*part.parameters(), *part.buffers()):
                owners.setdefault(id(weight), name)
    found = []
    for name in ("network", *reversed(PARTS.values())):
        parameters, buffers = (
            [weight for weight in weights if owners.get(id(weight), "network") == name]
            for weights in (module.parameters(), module.buffers())
        )
        trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
        found.append(PartCosts(name, sum(w.numel() for w in parameters), trained, bytes_of([*parameters, *buffers])))
    return tuple(part for part in found if part.bytes)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Size of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)
