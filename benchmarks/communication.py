"""Bytes that a training step sends: counted on two processes, and computed for 8, 64 and 512 GPUs.

    python benchmarks/communication.py [check] [recipes]

``check`` trains the tiny models with ``latentreward fit`` on two gloo processes, under DDP and under FSDP2, and sets
the bytes that their TCP connections sent beside the formula. ``recipes`` applies the formula to the shipped recipes at
full size, from their configs alone: the training step runs on tensors without values, as in ``fit --estimate``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import Goal, table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from latentreward.alignment import AlignmentModule
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.apps.commands.fit import estimate_fit
from latentreward.apps.estimate import estimate as estimated_settings
from latentreward.apps.estimate import step_costs as estimated_costs
from latentreward.apps.estimate.step_costs import RepeatedCalls, StepCosts
from latentreward.core.checkpoints.shards import frozen_names
from latentreward.core.contracts import TensorRecord, layout_of, map_tensors
from latentreward.diffusion import CachedPreferenceDataModule
from latentreward.diffusion.encoders.prompts import PromptEncoder
from latentreward.reward import RewardModule
from latentreward.reward.modules import sharding

ROOT = Path(__file__).resolve().parents[1]
GIGA, TERA = 1e9, 1e12
CACHED_ITEM = 2
"""Bytes of a number in a cache of ``latentreward cache``, which stores float16 unless told otherwise."""

# --- the formula ---------------------------------------------------------------------------------------------------


def all_gather(size: float, ranks: int) -> float:
    """Return the bytes that each rank sends so that all have the whole of ``size`` bytes: (N − 1) / N of it."""
    return (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int) -> float:
    """Return the bytes that each rank sends to sum ``size`` bytes in a ring: reduce-scatter, then all-gather."""
    return 2 * all_gather(size, ranks)


@dataclass(frozen=True)
class Weight:
    """Shape, bytes per element, and whether it trains, of a parameter."""

    shape: tuple[int, ...]
    itemsize: int
    trains: bool

    def padded(self, ranks: int) -> int:
        """Return the bytes of all shards: FSDP2 cuts the first axis into equal parts, the last ones padded."""
        rows, *rest = self.shape
        return ranks * math.ceil(rows / ranks) * math.prod(rest) * self.itemsize


@dataclass(frozen=True)
class Group:
    """Weights that FSDP2 gathers together, and how often in each phase.

    Attributes:
        weights: The weights.
        gathers: Phase (``rollout``, ``prompts``, ``batch``) → all-gathers.
        reductions: Reduce-scatters of a batch.
    """

    weights: tuple[Weight, ...]
    gathers: Mapping[str, int]
    reductions: int

    def gathered(self, phase: str, ranks: int) -> float:
        """Return the bytes that each rank sends for the all-gathers of a phase."""
        return self.gathers.get(phase, 0) * all_gather(sum(one.padded(ranks) for one in self.weights), ranks)

    def reduced(self, ranks: int) -> float:
        """Return the bytes of the gradients that a batch reduces, times the number of reductions."""
        return self.reductions * sum(one.padded(ranks) for one in self.weights if one.trains)


@dataclass(frozen=True)
class Parts:
    """What a recipe sends and computes, by process and optimiser step unless it says otherwise.

    Attributes:
        gradients: Bytes of the gradients.
        buffers: Bytes of the buffers that DDP sends before each step.
        groups: Groups of FSDP2; without text encoders under ``EncodeOnce``.
        costs: Costs of a batch and of a rollout.
        batch: Rows of a batch.
        accumulated: Batches.
        row: Bytes of a row of a rollout; 0 without rollouts.
        rows: Rows that a rollout makes if all are kept.
        prompts: Prompts of a rollout.
        prompt_flops: Computation to encode a prompt that is in store; 0 with ``EncodeOnce``.
        read: Bytes read from a cache.
    """

    gradients: int
    buffers: int
    groups: tuple[Group, ...]
    costs: StepCosts
    batch: int
    accumulated: int
    row: float
    rows: int
    prompts: int
    prompt_flops: float
    read: int

    def rollouts(self, kept: float = 1.0) -> float:
        """Return the rollouts, with the share ``kept`` of rows."""
        return self.batch * self.accumulated / (kept * self.rows) if self.rows else 0.0

    def ddp(self, ranks: int) -> float:
        """Return the bytes that DDP sends: gradients once, however many batches are accumulated."""
        return all_reduce(self.gradients, ranks) + all_gather(self.buffers, ranks)

    def fsdp2(self, ranks: int, kept: float = 1.0, reduce: Callable[[float, int], float] = all_gather) -> float:
        """Return the bytes that FSDP2 sends: gathers of weights and, for every batch, a reduce-scatter of gradients.

        Args:
            ranks: Number of processes.
            kept: Share of rows that rollouts keep.
            reduce: Bytes that a reduce-scatter of a size sends; gloo does it by an all-reduce.
        """
        total = 0.0
        for group in self.groups:
            total += self.accumulated * (group.gathered("batch", ranks) + reduce(group.reduced(ranks), ranks))
            prompts = ranks * group.gathered("prompts", ranks)
            total += self.rollouts(kept) * (group.gathered("rollout", ranks) + prompts)
        return total

    def exchanged(self, ranks: int) -> float:
        """Return the bytes that a rank gets, and passes on, so that all have the rows that the step takes."""
        return (ranks - 1) * self.batch * self.accumulated * self.row

    def computed(self, ranks: int, kept: float = 1.0) -> tuple[float, float]:
        """Return the FLOPs of the rollouts with the encoding of their prompts, and of the training."""
        rollout = self.costs.rollout + (ranks - 1) * self.prompts * self.prompt_flops
        times = self.rollouts(kept) if self.rows else self.accumulated  # ReFL samples in each batch
        return times * rollout, self.accumulated * (self.costs.forward + self.costs.backward)


# --- parts of a recipe, from its configs ---------------------------------------------------------------------------


class Gathers:
    """Counter of the all-gathers and reduce-scatters of FSDP2's groups while a module runs on stand-in tensors.

    ``fully_shard`` is replaced by :meth:`add`, so that the groups are those of a sharded run. A group is gathered at
    each call; and again in the backward pass for each call whose result needs a gradient, but only once for all calls
    whose arguments need none, because it then stays whole until the end of the backward pass. In the backward pass
    FSDP2 also gathers ahead the group that was called before, even if it has no part in the backward pass.

    Attributes:
        phase: Name of the phase that runs.
        count: (group, phase) → all-gathers.
        reductions: Group → reduce-scatters in the backward pass of a batch.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.count: Counter[tuple[int, str]] = Counter()
        self.reductions: Counter[int] = Counter()
        self.weights: list[tuple[Weight, ...]] = []
        self._seen: set[nn.Parameter] = set()
        self._modules: list[nn.Module] = []
        self._held: set[int] = set()
        self._calls: list[tuple[int, bool]] = []
        self._open: Counter[int] = Counter()

    def add(self, module: nn.Module, **_: Any) -> None:
        """Make a group of a module's weights that are in no group yet."""
        own = [weight for weight in module.parameters() if weight not in self._seen]
        self._seen.update(own)
        number = len(self.weights)
        self._modules.append(module)
        module.group_number = number  # type: ignore[assignment]
        self.weights.append(tuple(Weight(tuple(one.shape), one.itemsize, one.requires_grad) for one in own))
        module.register_forward_pre_hook(lambda *_: self.enter(number))
        module.register_forward_hook(
            lambda _, args, kwargs, result: self.leave(number, (args, kwargs), result), with_kwargs=True
        )

    def add_method(self, module: Any, name: str) -> None:
        """Count calls of a method too, as ``register_fsdp_forward_method`` makes it gather weights."""
        number, method = module.group_number, getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(number)
            result = method(*args, **kwargs)
            self.leave(number, (args, kwargs), result)
            return result

        setattr(module, name, call)

    def enter(self, number: int) -> None:
        """Count the gather of a call, unless an outer call of the group has it."""
        self._open[number] += 1
        if self._open[number] == 1 and self.phase != "backward":  # a checkpointed block finds its weights whole
            self.count[number, self.phase] += 1

    def leave(self, number: int, arguments: Any, result: Any) -> None:
        """Count the gather and the reduction that the call's backward pass takes."""
        self._open[number] -= 1
        if self._open[number] or self.phase != "batch":
            return
        in_backward = torch.is_grad_enabled() and needs_grad(result)
        self._calls.append((number, in_backward))
        if not in_backward or number in self._held:
            return
        if not needs_grad(arguments):
            self._held.add(number)
        self.count[number, self.phase] += 1
        self.reductions[number] += 1

    def ahead(self) -> set[int]:
        """Return the groups that the backward pass gathers for nothing: each was called before one that it needs."""
        inside = [set(module.modules()) for module in self._modules]
        roots = [max(n for n, parts in enumerate(inside) if module in parts) for module in self._modules]
        found, last = set(), dict[int, tuple[int, bool]]()
        for number, in_backward in self._calls:
            before = last.get(roots[number])
            if in_backward and before is not None and not before[1]:
                found.add(before[0])
            last[roots[number]] = number, in_backward
        return found

    @contextmanager
    def during(self, phase: str, after: str = "") -> Iterator[None]:
        """Count in a phase for the length of a block."""
        before, self.phase = self.phase, phase
        yield
        self.phase = after or before

    def groups(self, without: Collection[nn.Module] = ()) -> tuple[Group, ...]:
        """Return the groups with their counts, but for the groups of the modules in ``without``."""
        count = self.count + Counter({(number, "batch"): 1 for number in self.ahead()})
        return tuple(
            Group(
                weights,
                {phase: times for (group, phase), times in count.items() if group == number},
                self.reductions[number],
            )
            for number, weights in enumerate(self.weights)
            if self._modules[number] not in without
        )


def needs_grad(value: Any) -> bool:
    """Tell whether a tensor in a nested value needs a gradient."""
    found: list[bool] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf.requires_grad)
        elif isinstance(leaf, TensorRecord):
            map_tensors(leaf, lambda tensor: found.append(tensor.requires_grad) or tensor)
    return any(found)


class CountedCalls(RepeatedCalls):
    """Shortcut of the estimate that also counts the gathers of the calls that it skips."""

    def __init__(self, gathers: Gathers, *args: Any) -> None:
        super().__init__(*args)
        self.gathers, self._gathered = gathers, dict[Any, Counter[int]]()

    def watch(self, owner: Any, method: str, state: Callable[[], Any] = tuple) -> None:
        """See :meth:`RepeatedCalls.watch`."""
        super().watch(owner, method, state)
        inner = getattr(owner, method)

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                return inner(*arguments)
            key, phase, before = (
                (id(owner), state(), layout_of(arguments)),
                self.gathers.phase,
                self.gathers.count.copy(),
            )
            result = inner(*arguments)
            if (skipped := self._gathered.get(key)) is not None:
                self.gathers.count.update({(number, phase): times for number, times in skipped.items()})
            else:
                added = self.gathers.count - before
                self._gathered[key] = Counter({number: times for (number, _), times in added.items()})
            return result

        setattr(owner, method, call)


def parts_of(options: list[str]) -> Parts:
    """Compute the parts of a run of ``latentreward fit`` with these options."""
    gathers, found = Gathers(), dict[str, Any]()

    def watched(module: LightningModule, data: Namespace, accumulated: int, gpu: bool) -> StepCosts:
        encoders = [part for part in module.modules() if isinstance(part, PromptEncoder)]
        found.update(buffers=buffer_bytes(module), encoders={part for one in encoders for part in one.modules()})
        count_gathers(module, gathers)
        watch_phases(module, gathers, found, stack)
        return original(module, data, accumulated, gpu)

    original = estimated_settings.step_costs
    with ExitStack() as stack:
        for owner, name, replacement in (
            (sharding, "fully_shard", gathers.add),
            (sharding, "register_fsdp_forward_method", gathers.add_method),
            (estimated_settings, "step_costs", watched),
            (estimated_costs, "RepeatedCalls", lambda shapes: found.setdefault("calls", CountedCalls(gathers, shapes))),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        estimate = estimate_fit(options)
    trainer, data = estimate.settings.trainer, estimate.settings.data.init_args
    once = any(str(one.get("class_path")).endswith(".EncodeOnce") for one in trainer.get("callbacks") or [])
    return Parts(
        gradients=estimate.costs.gradients,
        buffers=found["buffers"],
        groups=gathers.groups(without=found["encoders"] if once else ()),
        costs=estimate.costs,
        batch=data.batch_size,
        accumulated=estimate.accumulated,
        row=found.get("row", 0.0),
        rows=found.get("rows", 0),
        prompts=data.get("prompts_per_rollout") or 0,
        prompt_flops=0.0 if once else found.get("prompt_flops", 0.0),
        read=estimate.accumulated * found.get("read", 0),
    )


def buffer_bytes(module: LightningModule) -> int:
    """Return the bytes of the buffers that DDP sends, which are those outside frozen modules."""
    ignored = frozen_names(module)
    return sum(buffer.nbytes for name, buffer in module.named_buffers() if name not in ignored)


def count_gathers(module: LightningModule, gathers: Gathers) -> None:
    """Make the groups of a module as its ``configure_model`` does under FSDP2."""
    mesh: Any = None
    if isinstance(module, RewardModule):
        sharding.shard(module, module.model.backbone, mesh)
    if isinstance(module, AlignmentModule):
        sharding.shard_policy(module.policy, mesh)
        if module.reward is not None:
            own = {*module.reward.modules()}
            scorers = [part for part in own if isinstance(part, LatentScorer)]
            sharding.shard_scorers([part.model.backbone for part in scorers], own, mesh)


def watch_phases(module: Any, gathers: Gathers, found: dict[str, Any], stack: ExitStack) -> None:
    """Tell ``gathers`` which phase runs, and find the sizes of rows and batches."""
    make_batch, training_step = estimated_costs.make_batch, module.training_step

    def batch_of(owner: Any, data: Namespace, shapes: Any) -> Any:
        with gathers.during("rollout"):
            batch = make_batch(owner, data, shapes)
        if issubclass(locate(data.class_path), CachedPreferenceDataModule):
            found["read"] = CACHED_ITEM * (batch.chosen.numel() + batch.rejected.numel())
        return batch

    def step(*arguments: Any) -> Any:
        with gathers.during("batch", after="backward"):
            return training_step(*arguments)

    stack.enter_context(patch.object(estimated_costs, "make_batch", batch_of))
    module.training_step = step
    if not isinstance(module, AlignmentModule) or module.experience is None:
        return
    roll_out, prepare, uncond = module.roll_out, module.prepare_prompts, module.policy.encode_uncond

    def rolled_out(prompts: Any) -> Any:
        rows = roll_out(prompts)
        sizes = [value.nbytes for value in vars(rows).values() if isinstance(value, Tensor)]
        found.update(rows=len(rows), row=sum(sizes) / len(rows))
        return rows

    def prepared(prompts: Any) -> None:
        before = found["calls"].shapes.flops
        with gathers.during("prompts"):
            prepare(prompts)
        found["prompt_flops"] = (found["calls"].shapes.flops - before) / len(prompts)

    def uncond_once(*given: Any) -> Any:
        with gathers.during("rollout" if gathers.phase == "prompts" else gathers.phase):
            return uncond(*given)

    module.roll_out, module.prepare_prompts, module.policy.encode_uncond = rolled_out, prepared, uncond_once


# --- bytes that two processes send ---------------------------------------------------------------------------------


def sent() -> int:
    """Return the bytes of payload that this process's open TCP connections have sent; Linux.

    The kernel counts them per connection (``tcpi_bytes_sent`` less ``tcpi_bytes_retrans`` of ``TCP_INFO``), so that
    other processes of the machine do not disturb.
    """
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            is_socket = str(path.readlink()).startswith("socket:")
        except FileNotFoundError:  # the listing's own
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(int(path.name))) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                    information = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    first, again = struct.unpack_from("QQ", information, 200)
                    total += first - again
    return total


class SentBytes(Callback):
    """Callback that writes the bytes sent so far, at the end of each optimiser step, to ``folder/RANK.json``.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.seen = Path(folder), dict[int, int]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the counters; the first batch of a step has no new step number, the last one has."""
        self.seen.setdefault(trainer.global_step, sent())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        path = self.folder / f"{trainer.global_rank}.json"
        path.write_text(json.dumps([self.seen[step] for step in range(1, trainer.global_step + 1)]))


def sent_in_run(options: list[str], strategy: str, folder: Path) -> float:
    """Run ``latentreward fit`` on two processes, and return the mean of both ranks' bytes per optimiser step."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counted = ["--trainer.callbacks+=communication.SentBytes", f"--trainer.callbacks.folder={folder}"]
    two = [f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    command = [sys.executable, "-m", "latentreward", "fit", *options, *two, *counted]
    paths = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    shared |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise SystemExit((folder / "0.log").read_text()[-3000:] + (folder / "1.log").read_text()[-3000:])
    totals = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return sum((seen[-1] - seen[0]) / (len(seen) - 1) for seen in totals) / 2


QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0")
STEPS = 5
"""Optimiser steps of a run; the first is left out, as it includes the start."""


def tiny(name: str, folder: Path, **settings: Any) -> list[str]:
    """Return the options of a short run of a tiny reward; its run folder is ``folder/NAME``."""
    data = {"lrm_tiny": "tinyworld_pickapic", "dina_lrm_tiny": "tinyworld_hpdv3"}[name]
    files = (f"model/{name}", f"data/{data}", "trainer/cpu")
    small = {"data.root": folder / data, "data.train_pairs": 96, "data.val_pairs": 8, "data.batch_size": 4}
    run = {"trainer.logger.save_dir": folder, "trainer.logger.name": name, "trainer.max_steps": STEPS}
    values = {**small, **run, **settings}
    return [
        *(f"--config={ROOT / 'configs' / one}.yaml" for one in files),
        *(f"--{key}={value}" for key, value in values.items()),
        *QUIET,
    ]


def tiny_lpo(folder: Path, **settings: Any) -> list[str]:
    """Return the options of a short LPO run with the run ``folder/lrm_tiny`` as reward; it keeps all pairs."""
    values = {
        "model.reward.path": folder / "lrm_tiny",
        "model.sampling.num_inference_steps": 4,  # 16 rows, which last for two optimiser steps
        "model.selection": "FixedThreshold",
        "model.selection.threshold": 0.0,
        "data.batch_size": 8,
        "data.prompts_per_rollout": 4,
        "trainer.max_steps": STEPS,
        "trainer.default_root_dir": folder / "lpo_tiny",
        **settings,
    }
    return [f"--config={ROOT / 'configs/align/lpo_tiny.yaml'}", *(f"--{k}={v}" for k, v in values.items()), *QUIET]


def cases(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, strategy and options of the runs that are checked; LPO's reward is trained by the first."""
    for strategy in ("ddp", "fsdp2"):
        logger = {"trainer.logger.name": "lrm_tiny" if strategy == "ddp" else "lrm_sharded"}
        yield "LRM, all weights", strategy, tiny("lrm_tiny", folder, **logger)
        yield (
            "LRM, 2 batches a step",
            strategy,
            tiny(
                "lrm_tiny", folder, **{"trainer.logger.name": f"two_{strategy}", "trainer.accumulate_grad_batches": 2}
            ),
        )
        yield "DiNa-LRM, LoRA", strategy, tiny("dina_lrm_tiny", folder, **{"trainer.logger.name": f"dina_{strategy}"})
        yield (
            "LPO with rollouts",
            strategy,
            tiny_lpo(folder, **{"trainer.default_root_dir": folder / f"lpo_{strategy}"}),
        )


def compared(name: str, strategy: str, options: list[str], folder: Path) -> tuple[float, float, float]:
    """Return the bytes of a rank and step: counted, by the formula with gloo's reduce-scatter, and by the formula."""
    parts = parts_of(options)
    counted = sent_in_run(options, strategy, folder / "counted" / f"{name} {strategy}")
    rows = parts.exchanged(2)
    if strategy == "ddp":
        return counted, parts.ddp(2) + rows, parts.ddp(2) + rows
    return counted, parts.fsdp2(2, reduce=all_reduce) + rows, parts.fsdp2(2) + rows


def check() -> None:
    """Print counted and computed bytes of the tiny models on two processes."""
    columns = ("run", "strategy", "counted, kB", "formula, gloo, kB", "counted / formula", "formula, NCCL, kB", "goal")

    def rows() -> Iterator[list[Any]]:
        with TemporaryDirectory(prefix="latentreward-") as name:
            for case, strategy, options in cases(Path(name)):
                counted, gloo, ring = compared(case, strategy, options, Path(name))
                ratio = counted / gloo
                shown = [f"{size / 1e3:.1f}" for size in (counted, gloo, ring)]
                yield [case, strategy, *shown[:2], f"{ratio:.3f}", shown[2], Goal(ratio, 0.9, 1.1)]

    table("Bytes that a rank sends in an optimiser step, two processes", columns, rows())


# --- the shipped recipes -------------------------------------------------------------------------------------------

SD35_AS_PUBLISHED = ("--trainer.devices=8", "--model.sampling.height=512", "--model.sampling.width=512")
RECIPES = {  # name → config files, and options
    "lrm_sd15": ("recipes/lrm_sd15",),
    "lrm_sdxl": ("recipes/lrm_sdxl",),
    "dina_lrm_sd35": ("recipes/dina_lrm_sd35",),
    # configs/cache/hpdv3_sd35.yaml leaves prompts text
    "dina_lrm_sd35_cached": ("recipes/dina_lrm_sd35", "recipes/dina_lrm_sd35_cached", "--data.cached_text=false"),
    "lpo_sd15": ("align/lpo_sd15",),
    "lpo_sdxl": ("align/lpo_sdxl",),
    "grpo_stepwise_sd35": ("policy/sd35_medium", "method/grpo_stepwise", *SD35_AS_PUBLISHED),
    "refl_sd35": ("align/refl_sd35",),
}
GPUS = (8, 64, 512)
KEPT = (1.0, 0.5, 0.25)
BANDWIDTH = 25.0
"""GB/s that a GPU sends: an example, not a measured figure."""
SPEED = 400.0
"""TFLOP/s that a GPU computes: an example, not a measured figure."""


PART_COLUMNS = (
    *("recipe", "batch × batches", "gradients, GB", "weights, GB", "cache read, MB"),
    *("prompts rolled out", "row, kB", "rollouts, TFLOP", "training, TFLOP"),
)
SENT_COLUMNS = (
    *("recipe", "GPUs", "global batch", "DDP, GB", "FSDP2, GB", "rows, GB"),
    *("computing, s", "DDP, s", "FSDP2, s", "rows, s", "rows held, GB"),
)


def cell(value: float, unit: float = 1.0) -> str:
    """Format a number in a unit with three digits; a dash for 0."""
    return f"{value / unit:.3g}" if value else "–"


def part_row(name: str, parts: Parts) -> list[str]:
    """Return what one GPU holds, reads and samples in an optimiser step, whatever their number."""
    stored = sum(weight.padded(1) for group in parts.groups for weight in group.weights)
    return [
        f"`{name}`",
        f"{parts.batch} × {parts.accumulated}",
        cell(parts.gradients, GIGA),
        cell(stored, GIGA),
        cell(parts.read, 1e6),
        cell(parts.rollouts() * parts.prompts),
        cell(parts.row, 1e3),
        *(cell(flops, TERA) for flops in parts.computed(1)),
    ]


def sent_row(name: str, parts: Parts, ranks: int) -> list[str]:
    """Return what one of ``ranks`` GPUs sends in an optimiser step, and the example's seconds."""
    rows = parts.exchanged(ranks)
    rollout, training = parts.computed(ranks)
    sizes = parts.ddp(ranks), parts.fsdp2(ranks), rows
    seconds = (rollout + training) / TERA / SPEED, *(size / GIGA / BANDWIDTH for size in sizes)
    held = ranks * parts.rows * parts.row
    shown = [*(cell(size, GIGA) for size in sizes), *map(cell, seconds), cell(held, GIGA)]
    return [f"`{name}`", str(ranks), f"{ranks * parts.batch * parts.accumulated:,}", *shown]


def share_row(name: str, parts: Parts) -> list[str]:
    """Return the share of rollouts in the computation, on 8 and on 512 GPUs."""
    shares = [
        rollout / (rollout + training)
        for ranks in (8, 512)
        for rollout, training in (parts.computed(ranks, kept) for kept in KEPT)
    ]
    return [f"`{name}`", *(f"{share:.0%}" for share in shares)]


def recipes() -> None:
    """Print what the shipped recipes send and compute."""
    found: dict[str, Parts] = {}

    def computed() -> Iterator[list[str]]:
        for name, files in RECIPES.items():
            options = [one if one.startswith("--") else f"--config={ROOT / 'configs' / one}.yaml" for one in files]
            found[name] = parts_of(options)
            yield part_row(name, found[name])

    table(
        "One GPU and optimiser step",
        PART_COLUMNS,
        computed(),
    )
    table(
        f"Sent by each GPU in an optimiser step; s at {SPEED:g} TFLOP/s and {BANDWIDTH:g} GB/s, both assumed",
        SENT_COLUMNS,
        (sent_row(name, parts, ranks) for name, parts in found.items() for ranks in GPUS),
    )
    kept = [f"{ranks} GPUs, {share:.0%} kept" for ranks in (8, 512) for share in KEPT]
    table(
        "Share of rollouts in the computation",
        ("recipe", *kept),
        (share_row(name, parts) for name, parts in found.items() if parts.rows),
    )


def main() -> None:
    """Run the named parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"check": check, "recipes": recipes}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all without one")
    chosen = parser.parse_args().parts or [*parts]
    if unknown := set(chosen) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    for name in chosen:
        parts[name]()


if __name__ == "__main__":
    main()
