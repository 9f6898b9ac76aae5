"""Training batches of stand-in tensors, and memory and computation of one training step of a module on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from pydoc import locate
from types import MappingProxyType
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from latentreward.alignment import AlignmentModule, DiffusionDPOModule, Policy, ReFLModule, Reward, StepAwarePixelModule
from latentreward.alignment.rewards.callable import FunctionReward
from latentreward.alignment.rewards.http import RemoteReward
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.alignment.rewards.pixel import DecodingReward, ImageReward
from latentreward.apps.estimate.shapes import (
    CPU,
    SavedTensors,
    ShapesOnly,
    gpu_autocast,
    is_stand_in,
    replace_tensors,
)
from latentreward.core.contracts import (
    Conditioning,
    EditPrompt,
    LatentSpace,
    NoisyStates,
    PreferenceBatch,
    PromptBatch,
    layout_of,
    map_tensors,
    take_rows,
)
from latentreward.core.errors import InputError, check_multiples, first_line
from latentreward.core.registry import of_this_package
from latentreward.data import PromptsAndImages
from latentreward.data.clips import FPS, check_clips, check_frames
from latentreward.data.dataset import stack_targets
from latentreward.diffusion import CachedPreferenceDataModule
from latentreward.diffusion.backbones.weights import PLANNED, stored_bytes
from latentreward.diffusion.cache.store import SPEC, CacheSpec, read_plan
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.diffusion.encoders.vae import LatentEncoder, edit_of_grey
from latentreward.reward import RewardHead, RewardModule
from latentreward.reward.scorers.step_aware import StepAwareCLIP

TEXT = "text encoders"
PARTS = {
    Reward: "reward",
    RewardHead: "head",
    StepAwareCLIP: "scorer",
    PromptEncoder: TEXT,
    LatentEncoder: "VAE",
}
"""Class → name of its weights in the tables; the outer one of two counts, and all other weights are ``network``."""


@dataclass(frozen=True)
class PartCosts:
    """Weights of one part of a module."""

    name: str
    parameters: int  # number of parameters
    trained: int  # number of trainable parameters
    bytes: int  # size of parameters and buffers, as quantised layers store theirs


@dataclass(frozen=True)
class StepCosts:
    """Memory and computation of a training step; sizes in bytes, computation in FLOPs."""

    parts: tuple[PartCosts, ...]  # weights of each part of the module
    gradients: int  # size of the gradients
    optimizer: str  # class of the optimiser
    state: int  # size of the optimiser's state
    saved: int  # peak size of the tensors that autograd keeps for the backward pass of one batch
    batch_peak: int  # peak memory in the forward and backward pass of one batch, with weights and optimiser state
    update_peak: int  # peak memory in the optimiser's step, with weights and optimiser state
    rollout_peak: int  # peak memory in a rollout, with weights and optimiser state; 0 without rollouts
    forward: int  # computation of one batch up to the loss, without sampling
    backward: int  # computation of the backward pass of one batch, with the blocks that checkpointing recomputes
    rollout: int  # computation of a rollout; in ReFL, of the sampling steps before the first step with a graph
    rollout_rows: int = 0  # rows to learn from of a rollout if all are kept; 0 without rollouts
    freed: int = 0  # size of weights that are in memory before the first step, and freed then

    @property
    def weights(self) -> int:
        """Size of all weights in bytes."""
        return sum(part.bytes for part in self.parts)

    @property
    def peak(self) -> int:
        """Peak memory of the run in bytes."""
        return max(self.batch_peak, self.update_peak, self.rollout_peak, self.start)

    @property
    def start(self) -> int:
        """Memory before the first step in bytes: all weights, with those that are freed before that step."""
        return self.weights + self.freed

    def without(self, name: str) -> StepCosts:
        """Return the costs if the weights of a part are freed before the first step; its computation still counts."""
        freed = sum(part.bytes for part in self.parts if part.name == name)
        return replace(
            self,
            parts=tuple(part for part in self.parts if part.name != name),
            batch_peak=self.batch_peak - freed,
            update_peak=self.update_peak - freed,
            rollout_peak=max(0, self.rollout_peak - freed),
            freed=self.freed + freed,
        )


class RepeatedCalls:
    """Shortcut for methods that are called many times without gradients, such as the policy's in sampling.

    A call with arguments of the shapes and dtypes of an earlier one is not run, but counted as that one.
    """

    def __init__(self, shapes: ShapesOnly) -> None:
        self.shapes = shapes  # mode that runs the operations and counts
        self.sampled = 0  # FLOPs of the policy in calls without gradients and with its adapter on
        self._seen: dict[Any, tuple[int, int, Any]] = {}

    def watch(self, owner: Any, method: str, state: Callable[[], Any] = tuple) -> None:
        """Replace ``owner.method`` by a version that skips repeated calls, of equal ``state()`` too, without gradients.

        The state is, for example, whether the adapter is on.
        """
        original, shapes, live = getattr(owner, method), self.shapes, self.shapes.live

        def like(one: Tensor) -> Tensor:
            if one.dtype == torch.bool:  # a mask is real, because families count its tokens
                return torch.ones(one.shape, dtype=torch.bool, device=CPU)
            return shapes.stand_in(one.shape, one.dtype)

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                return original(*arguments)
            key = id(owner), (working := state()), layout_of(arguments)
            if key in self._seen:
                flops, extra, layout = self._seen[key]
                live.peak = max(live.peak, live.now + extra)
                shapes.flops += flops
                result = map_tensors(layout, like)
            else:
                flops, before, peak = shapes.flops, live.now, live.peak
                live.peak = before
                result = original(*arguments)
                flops = shapes.flops - flops
                layout = map_tensors(result, lambda one: torch.empty(one.shape, dtype=one.dtype, device="meta"))
                self._seen[key] = flops, live.peak - before, layout
                live.peak = max(live.peak, peak)
            if isinstance(owner, Policy) and working:
                self.sampled += flops
            return result

        setattr(owner, method, call)


def step_costs(module: LightningModule, data: Namespace, accumulated: int = 1, gpu: bool = True) -> StepCosts:
    """Run one training step of ``module`` on stand-in tensors, and return its memory and computation.

    The module is on the meta device, has a CPU trainer attached, and cannot be used afterwards. ``gpu`` says whether
    autocast and optimiser count with the memory that they need on a GPU.
    """
    shapes = ShapesOnly()
    calls, live = RepeatedCalls(shapes), shapes.live
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    replace_tensors(module.train(), lambda name, old: shapes.stand_in(old.shape, old.dtype))
    module._device = CPU  # a LightningModule remembers where it was made, and its `to` would copy the weights
    for layer, kind in planned_layers(module):
        if kind == "int8":  # torchao unpacks a copy of the weight, which autograd keeps
            layer.forward = lambda inputs, own=layer: F.linear(inputs, own.weight.clone(), own.bias)
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
        live.peak, shapes.flops = live.now, 0
        batch = make_batch(module, data, shapes)
        rollout_peak, rollout = live.peak, shapes.flops
        live.peak, sampled = live.now, calls.sampled
        with (saved := SavedTensors([*module.parameters(), *module.buffers()])):
            with module.trainer.precision_plugin.train_step_context():
                result = module.training_step(batch, 0)
            loss = (result["loss"] if isinstance(result, Mapping) else result) / accumulated
            del result, batch
        forward = shapes.flops - rollout
        loss.backward()
        backward = shapes.flops - rollout - forward
    if isinstance(module, ReFLModule):
        rollout = calls.sampled - sampled
        forward -= rollout
    quantized = {id(layer.weight): stored_bytes(layer, kind) for layer, kind in planned_layers(module)}
    packed = bytes_of(module.parameters()) - bytes_of(module.parameters(), quantized)
    return StepCosts(
        parts=part_costs(module, quantized),
        gradients=bytes_of(trained),
        optimizer=type(optimizer).__name__,
        state=bytes_of(value for state in optimizer.state.values() for value in state.values() if is_stand_in(value)),
        saved=saved.bytes.peak,
        batch_peak=live.peak - packed,
        update_peak=update_peak - packed,
        rollout_peak=rollout_peak - packed if isinstance(module, AlignmentModule) and module.experience else 0,
        forward=forward,
        backward=backward,
        rollout=rollout,
        rollout_rows=shapes.rollout_rows,
    )


def watch_sampling(module: LightningModule, calls: RepeatedCalls) -> None:
    """Let ``calls`` count the policy and reward of an alignment module, and skip their repeated calls.

    Where a reward needs pictures, a server or values, it gives the mean of what would be scored.
    """
    policy, reward = getattr(module, "policy", None), getattr(module, "reward", None)
    if not isinstance(policy, Policy):
        return
    calls.watch(policy, "predict", lambda: policy.adapters.working)
    for part in module.modules():
        if isinstance(part, PromptEncoder):
            calls.watch(part, "forward")
    for part in () if reward is None else reward.modules():
        if isinstance(part, ImageReward | RemoteReward):  # PIL images, which stand-ins cannot become
            part.score = lambda states, _, own=part: torch.cat(own.decode(states)).mean(dim=(1, 2, 3))  # type: ignore[method-assign, misc]
            part.encode_prompts = tuple  # type: ignore[method-assign, assignment]
        elif isinstance(part, FunctionReward) or (
            isinstance(part, Reward) and not of_this_package(type(part).__module__)
        ):
            part.score = partial(score_or_mean, part.score)  # type: ignore[method-assign]
        if isinstance(part, RemoteReward):
            part.begin_parts = partial(answer_alone, part)  # type: ignore[method-assign]
        if isinstance(part, DecodingReward):
            calls.watch(part, "score")
        if isinstance(part, LatentScorer):
            calls.watch(part.model.backbone, "read", lambda: policy.adapters.working)


def score_or_mean(score: Callable[[NoisyStates, Any], Tensor], states: NoisyStates, encoded: Any) -> Tensor:
    """Score by ``score``; if that fails on tensors without values, say so and return means of the latents."""
    try:
        return score(states, encoded)
    except InputError:
        raise
    except Exception as error:  # of any code
        told = f"{type(error).__name__}: {first_line(error)}"
        rank_zero_warn(f"--estimate leaves out a reward that cannot score tensors without values ({told})")
        return states.latents.flatten(1).mean(dim=1)


def answer_alone(reward: RemoteReward, latents: Tensor, rows: Tensor, encoded: Any, *_: Any) -> Callable[[], Tensor]:
    """Score finished latents at once, without asking the server of ``reward``."""
    scores = reward.score(NoisyStates(latents, torch.zeros(len(latents)), rows, latents), encoded)
    return lambda: scores[:, None]


def optimizer_of(module: LightningModule, foreach: bool) -> Optimizer:
    """Return the module's optimiser; ``foreach`` selects the multi-tensor update, the default on a GPU."""
    built: Any = module.configure_optimizers()
    optimizer = built.get("optimizer") if isinstance(built, Mapping) else built
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"--estimate knows modules with one optimiser, which {type(module).__name__} has not")
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def part_costs(module: LightningModule, quantized: Mapping[int, int]) -> tuple[PartCosts, ...]:
    """Return the weights by part, shared ones once; ``quantized`` are sizes of quantised weights, by id."""
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
        size = bytes_of([*parameters, *buffers], quantized)
        found.append(PartCosts(name, sum(w.numel() for w in parameters), trained, size))
    return tuple(part for part in found if part.bytes)


def planned_layers(module: nn.Module) -> list[tuple[Any, str]]:
    """Return each layer that a run would quantise, and the kind."""
    return [(layer, getattr(layer, PLANNED)) for layer in module.modules() if hasattr(layer, PLANNED)]


def bytes_of(tensors: Iterable[Tensor], quantized: Mapping[int, int] = MappingProxyType({})) -> int:
    """Return the size of all tensors together in bytes; of those in ``quantized``, by their ids, as given there."""
    return sum(quantized.get(id(tensor), tensor.nbytes) for tensor in tensors)


NETWORKS = {DiffusionDPOModule: "policy", StepAwarePixelModule: "generator", RewardModule: "model.backbone"}
"""Module that learns from pairs → its attribute with the network whose size and space the pairs have."""


def make_batch(module: LightningModule, data: Namespace, shapes: ShapesOnly) -> Any:
    """Make a training batch for ``module``; a module that learns from rollouts makes a rollout first.

    ReFL's ``stop_range`` is set to the latest stop.
    """
    prompts, images = data, None
    if issubclass(locate(data.class_path), PromptsAndImages):
        prompts, images = data.init_args.prompts, data.init_args.images
    if isinstance(module, AlignmentModule) and (sampling := getattr(module, "sampling", None)) is not None:
        module.policy.edit_at(sampling.height, sampling.width)
    if isinstance(module, AlignmentModule) and module.experience:
        told = prompt_batch(module.policy, data.init_args.prompts_per_rollout)
        with module.sampling_context():
            # Not `roll_out`, which refuses a key of several rows: stand-ins select the same step each time.
            rows: Any = module.make_experience(told)
        shapes.rollout_rows = len(rows)
        chosen = take_rows(rows, [number % len(rows) for number in range(batch_size(data))])
        module.prepare_prompts(told.prompts)
        return map_tensors(chosen, lambda t: shapes.stand_in(t.shape, t.dtype) if is_stand_in(t) else t)
    if isinstance(module, ReFLModule):
        module.stop_range = (module.stop_range[0],) * 2  # the latest stop, which takes the most steps
        batch = prompt_batch(module.policy, batch_size(prompts))
        return batch if images is None else {"prompts": batch, "images": pair_batch(module.policy, images, shapes)}
    for kind, network in NETWORKS.items():
        if isinstance(module, kind):
            return pair_batch(attrgetter(network)(module), data, shapes)
    raise InputError(f"--estimate does not know what batches a {type(module).__name__} takes; it knows our own modules")


def pair_batch(network: Any, data: Namespace, shapes: ShapesOnly) -> PreferenceBatch:
    """Make a batch of pairs, of images or cached latents, as ``data`` would; each pair has its own prompt."""
    settings, space = data.init_args, network.latent_space
    latents = issubclass(locate(data.class_path), CachedPreferenceDataModule)
    (height, width), count, with_text = network.native_size, batch_size(data), False
    frames = settings.get("frames") or 1
    if latents:
        caches = written_caches(settings)
        if train := caches.get("train"):
            frames = train.images.frames
            (height, width), count = largest_batch(data, train.images.sizes(), frames, space)
        with_text = settings.cached_text and all(cache.text is not None for cache in caches.values())
    elif (size := settings.get("size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
        check_multiples("data.size", (height, width), network.side_multiple)
    check_clips("data.", frames, settings.get("fps") or FPS)
    if frames > 1:
        check_frames("the cache has images." if latents else "data.", network, frames)
    clip = (3, height, width) if frames == 1 else (3, frames, height, width)
    shape = space.shape(height, width, frames) if latents else clip
    names = tuple(str(number) for number in range(count))
    targets = None
    if (given := settings.get("targets")) is not None:
        kinds, columns = 2 if given.uncertainties else 1, len(given.columns)
        targets = stack_targets([shapes.stand_in((2, kinds, columns)) for _ in names])
    encoder = network.text_encoder

    def encoded(rows: int) -> Conditioning:  # prompts of the greatest length
        pooled = shapes.stand_in((rows, encoder.pooled_dim)) if encoder.pooled_dim else None
        mask = torch.ones(rows, encoder.num_tokens, dtype=torch.bool) if encoder.masked else None
        return Conditioning(shapes.stand_in((rows, encoder.num_tokens, encoder.token_dim)), pooled, mask)

    return PreferenceBatch(
        pair_ids=names,
        prompts=prompts_for(network, count),
        chosen=shapes.stand_in((count, *shape)),
        rejected=shapes.stand_in((count, *shape)),
        chosen_keys=tuple(f"{name} chosen" for name in names),
        rejected_keys=tuple(f"{name} rejected" for name in names),
        label=torch.ones(count),
        targets=targets,
        weight=torch.ones(count),
        latent_space=space if latents else None,
        conditioning=encoded(count) if with_text else None,
        uncond=encoded(1) if with_text else None,
        sources=tuple(shapes.stand_in((count, *shape)) for _ in range(counted_sources(network))),
    )


def prompt_batch(policy: Policy, count: int) -> PromptBatch:
    """Make a batch of ``count`` different prompts."""
    return PromptBatch(prompts_for(policy, count), tuple(f"0/{n}" for n in range(count)))


def prompts_for(network: Any, count: int) -> tuple[str, ...]:
    """Make ``count`` different prompts, each of as many pictures of its own as an editor needs."""
    (grey,), texts = edit_of_grey().sources, [f"prompt {number}" for number in range(count)]
    places = range(counted_sources(network))
    return tuple(EditPrompt(text, [replace(grey, image_key=f"{text}, {place}") for place in places]) for text in texts)


def counted_sources(network: Any) -> int:
    """Return the least number of pictures that a policy or a backbone edits; 1 if it edits 1 or none."""
    least, most = getattr(network, "family", network).sources
    return least or int(most == 1)


def batch_size(data: Namespace) -> int:
    """Return the batch size in the settings of a data module; raise InputError if they have none."""
    if (count := data.init_args.get("batch_size")) is None:
        raise InputError(f"data: {data.class_path} has no setting batch_size, which --estimate needs")
    return count


def written_caches(settings: Namespace) -> dict[str, CacheSpec]:
    """Return the settings of a data module's caches by split, of those that are written."""
    splits = ((name, settings.get(name)) for name in ("train", "val", "test", "predict"))
    folders = {name: Path(split.cache) for name, split in splits if isinstance(split, Namespace) and "cache" in split}
    return {name: read_plan(folder).spec for name, folder in folders.items() if (folder / SPEC).is_file()}


def largest_batch(
    data: Namespace, sizes: Sequence[tuple[int, int]], frames: int, space: LatentSpace
) -> tuple[tuple[int, int], int]:
    """Return the size whose batches hold the most pixels, and their number of pairs; clips have several ``frames``."""

    def pairs(size: tuple[int, int]) -> int:
        if (tokens := data.init_args.get("tokens_per_batch")) is None:
            return batch_size(data)
        return max(1, tokens // math.prod(space.shape(*size, frames)[1:]))

    size = max(sizes, key=lambda size: pairs(size) * math.prod(size))
    return size, pairs(size)
