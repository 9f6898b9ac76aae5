"""Count the work of one step and one rollout of every module, on tiny networks on a CPU; rewrite ``budgets.json``.

Usage: ``python benchmarks/budgets.py [CASE ...] [--write] [--sources] [--precision P] [--plain]``. Prints a Markdown
table of counts, no times: operations, kernels, bytes as if nothing were fused, and reads by the host (``counting.py``).
Each is that of the third optimiser step under ``Trainer``, with clipping, AdamW, a moving average and logging, and of
the rollout before it; optimiser and clipping take the ``foreach`` operations that are the default on a GPU, and
LoRA the fused ones of ``performance.fused_lora``.

``--precision bf16-mixed`` counts under autocast, ``--plain`` with peft's own LoRA layers; neither is for the table.
``--write`` puts the counts into ``benchmarks/budgets.json``. A count that is more than 2 % above it fails
``tests/benchmarks/test_budgets.py``. ``--sources`` also prints the lines of the program that read values, and the most
frequent operations.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import lightning  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from counting import Work, WorkCounter  # noqa: E402
from latentreward.callbacks import TrainableEMA  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from torch.optim import AdamW  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from latentreward.alignment import (  # noqa: E402
    AWMModule,
    Branching,
    CRDModule,
    DGPOModule,
    DiffusionDPOModule,
    DiffusionNFTModule,
    DiffusionOPSDModule,
    LatentReward,
    LPOModule,
    OnPolicyDistillationModule,
    QuantileThreshold,
    RAMModule,
    RandomSteps,
    ReFLModule,
    Sampling,
    StepAwarePixelModule,
    StepwiseGRPOModule,
    StratifiedSteps,
    Teacher,
    TrajectoryGRPOModule,
)
from latentreward.data import PromptsAndImages, collate_pairs  # noqa: E402
from latentreward.data.alignment.prompts import PromptLoaders  # noqa: E402
from latentreward.diffusion.backbones.fused_lora import fuse_lora  # noqa: E402
from tests.alignment.modules.batches import dina, loaded_pairs, lrm  # noqa: E402
from tests.alignment.modules.lpo_runs import PROMPTS  # noqa: E402
from tests.alignment.policies.alignment import tiny_source  # noqa: E402
from tests.alignment.rewards.stored import write_run  # noqa: E402
from tests.reward.scorers.tiny_clip import write_clip  # noqa: E402

FOLDER = tempfile.TemporaryDirectory(prefix="budgets_")  # removed when the program ends
TABLE = ROOT / "benchmarks" / "budgets.json"
GROWTH = 1.02  # factor by which a count may grow
STEPS = 3  # optimiser steps of a case; the last one is counted
OPTIMIZER = partial(AdamW, lr=1e-4, foreach=True)
SHORT: dict[str, Any] = {"sampling": Sampling(num_inference_steps=4), "optimizer": OPTIMIZER, "seed": 1}
VERSIONS = {
    one.__name__: one.__version__.partition("+")[0] for one in (torch, diffusers, transformers, peft, lightning)
}


@cache
def reward(method: str, name: str) -> LatentReward:
    """Return a tiny reward model on a network of its own, written once."""
    folder = Path(FOLDER.name, method)
    write_run(folder, method, name)
    return LatentReward(str(folder), share="never")


def pairs() -> DataLoader[Any]:
    """Return batches of four pairs of pictures."""
    return DataLoader(loaded_pairs(4 * STEPS), batch_size=4, collate_fn=collate_pairs)


def prompts() -> PromptLoaders:
    """Return batches of four rows; a rollout has two prompts."""
    return PromptLoaders(PROMPTS, batch_size=4, prompts_per_rollout=2, batches_per_epoch=STEPS, seed=1)


def lpo(name: str, method: str) -> tuple[Any, Any]:
    """Return a case of LPO, every pair of which is kept."""
    settings = {"candidates": Branching(3), "guidance_scale": 2.0, **SHORT}
    return LPOModule(tiny_source(name), reward(method, name), QuantileThreshold(0.0), **settings), prompts()


CASES: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "LRM, U-Net": lambda: (lrm("sd15", backbone={"tuning": "full"}, optimizer=OPTIMIZER), pairs()),
    "DiNa-LRM, DiT": lambda: (dina("sd35", optimizer=OPTIMIZER), pairs()),
    "LPO, U-Net": lambda: lpo("sd15", "lrm"),
    "GRPO, DiT": lambda: (
        TrajectoryGRPOModule(
            tiny_source("sd35"), reward("dina", "sd35"), num_trajectories=3, guidance_scale=2.0, **SHORT
        ),
        prompts(),
    ),
    "DiffusionNFT, DiT": lambda: (
        DiffusionNFTModule(tiny_source("sd35"), reward("dina", "sd35"), num_samples=4, **SHORT),
        prompts(),
    ),
    "step-aware pixel scorer": lambda: (
        StepAwarePixelModule(tiny_source("sd15"), write_clip(Path(FOLDER.name, "clip")), optimizer=OPTIMIZER, seed=1),
        pairs(),
    ),
    "Diffusion-DPO, U-Net": lambda: (
        DiffusionDPOModule(tiny_source("sd15"), beta=50.0, optimizer=OPTIMIZER, seed=1),
        pairs(),
    ),
    "LPO, DiT": lambda: lpo("sd35", "dina"),
    "step-wise GRPO, U-Net": lambda: (
        StepwiseGRPOModule(tiny_source("sd15"), reward("lrm", "sd15"), candidates=Branching(3), **SHORT),
        prompts(),
    ),
    "AWM, DiT": lambda: (
        AWMModule(tiny_source("sd35"), reward("dina", "sd35"), num_samples=4, steps=StratifiedSteps(2), **SHORT),
        prompts(),
    ),
    "RAM, DiT": lambda: (
        RAMModule(tiny_source("sd35"), reward("dina", "sd35"), draws=2, num_samples=4, **SHORT),
        prompts(),
    ),
    "DGPO, DiT": lambda: (
        DGPOModule(tiny_source("sd35"), reward("dina", "sd35"), num_samples=2, steps=RandomSteps(), **SHORT),
        prompts(),
    ),
    "CRD, DiT": lambda: (CRDModule(tiny_source("sd35"), reward("dina", "sd35"), num_samples=2, **SHORT), prompts()),
    "on-policy distillation, DiT": lambda: (
        OnPolicyDistillationModule(tiny_source("sd35"), [Teacher(guidance_scale=3.0)], **SHORT),
        prompts(),
    ),
    "DiffusionOPSD, DiT": lambda: (
        DiffusionOPSDModule(tiny_source("sd35"), reward("dina", "sd35"), **SHORT),
        prompts(),
    ),
    "ReFL, U-Net": lambda: (
        ReFLModule(
            tiny_source("sd15"), reward("lrm", "sd15"), stop_range=(3, 3), guidance_scale=1.0, kl_weight=0, **SHORT
        ),
        prompts(),
    ),
    "PRFL, DiT": lambda: (
        ReFLModule(
            tiny_source("sd35"),
            reward("dina", "sd35"),
            stop_range=(3, 3),
            scored="state",
            guidance_scale=1.0,
            kl_weight=0,
            **SHORT,
        ),
        prompts(),
    ),
}
"""Name of a case → function that builds its module and data."""


class Boundaries(Callback):
    """Callback that notes the counts at the start of each batch, and excludes a batch's rollout."""

    def __init__(self, counter: WorkCounter, fused: bool) -> None:
        self.counter, self.fused = counter, fused
        self.start = self.rollout = self.step = Work()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse LoRA; count rollouts, with the prompts that are encoded for their rows, by themselves."""
        if self.fused:
            fuse_lora(pl_module)
        for name in ("roll_out", "prepare_prompts"):
            if hasattr(pl_module, name):
                setattr(pl_module, name, partial(self._counted, getattr(pl_module, name), name == "roll_out"))

    def _counted(self, function: Callable[..., Any], first: bool, *arguments: Any) -> Any:
        before = self.counter.work
        result = function(*arguments)
        self.rollout = self.counter.work - before + (Work() if first else self.rollout)
        return result

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin a step."""
        self.start = self.counter.work
        self.counter.by_name.clear()
        self.counter.read_at.clear()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Name the numbers of the optimiser's steps, which a GPU's run keeps on the host."""
        self.counter.on_host = {state["step"].data_ptr() for state in optimizer.state.values()}


class EndOfStep(CSVLogger):
    """Logger whose last call ends a step; values are converted for it as for any logger."""

    def __init__(self, boundaries: Boundaries) -> None:
        super().__init__(FOLDER.name)
        self.boundaries = boundaries

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Note the counts of the step."""
        self.boundaries.step = self.boundaries.counter.work - self.boundaries.start


def count(
    name: str, sources: bool = False, precision: Any = "32-true", fused: bool = True
) -> tuple[dict[str, Work], WorkCounter]:
    """Count the work of the last step of a case, and of its last rollout if it has one."""
    module, data = CASES[name]()
    given = {"datamodule": data} if isinstance(data, PromptLoaders | PromptsAndImages) else {"train_dataloaders": data}
    counter = WorkCounter(sources)
    boundaries = Boundaries(counter, fused)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=STEPS,
        max_epochs=1,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        callbacks=[boundaries, TrainableEMA()],
        logger=EndOfStep(boundaries),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with counter:
            trainer.fit(module, **given)
    found = {"step": boundaries.step, "rollout": boundaries.rollout}
    return {part: work for part, work in found.items() if work != Work()}, counter


def grown(name: str, found: dict[str, Work]) -> list[str]:
    """Return what of a case grew by more than 2 % since the table was written, in words."""
    kept = json.loads(TABLE.read_text())["counts"].get(name, {})
    return [
        f"{name}, {part}: {number} {what}, {kept[part][what]} in benchmarks/budgets.json"
        for part, work in found.items()
        for what, number in asdict(work).items()
        if part in kept and number > GROWTH * kept[part][what]
    ] + [f"{name}: {part} is not in benchmarks/budgets.json" for part in found if part not in kept]


def main() -> None:
    """Print the counts, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of names of cases; by default all")
    parser.add_argument("--write", action="store_true", help="put the counts into budgets.json")
    parser.add_argument("--sources", action="store_true", help="print where values are read, and operations")
    parser.add_argument("--precision", default="32-true", help="the trainer's precision")
    parser.add_argument("--plain", action="store_true", help="count with peft's own LoRA layers")
    options = parser.parse_args()
    if options.write and (options.plain or options.precision != "32-true"):
        parser.error("--write takes the counts in 32-true, with fused LoRA")
    torch.set_num_threads(1)
    kept = json.loads(TABLE.read_text())["counts"] if TABLE.exists() else {}
    print("| case | part | MFLOP | kernels | MB | reads |\n|---|---|---|---|---|---|")
    for name in [name for name in CASES if not options.cases or name.startswith(tuple(options.cases))]:
        found, counter = count(name, options.sources, options.precision, not options.plain)
        kept[name] = {part: asdict(work) for part, work in found.items()}
        for part, work in found.items():
            row = (f"{work.flops / 1e6:.2f}", work.kernels, f"{work.bytes / 1e6:.2f}", work.reads)
            print(f"| {name} | {part} | {' | '.join(map(str, row))} |", flush=True)
        for table in (counter.read_at, counter.by_name) if options.sources else ():
            print(*(f"    {number} {key}" for key, number in table.most_common(14)), sep="\n")
    if options.write:
        TABLE.write_text(json.dumps({"versions": VERSIONS, "counts": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
