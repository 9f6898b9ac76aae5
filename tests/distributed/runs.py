"""Small training runs that are the same on one process and, with a batch per rank half as large, on two."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks import TrainableCheckpoint, TrainableEMA
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Sampler

from latentreward.core.checkpoints.files import DurableCheckpointIO
from latentreward.core.checkpoints.shards import whole_tensor
from latentreward.data import collate_pairs
from latentreward.reward import LRMLoss, RegressionDistillation, RewardModule, TargetLoss, TieLoss
from tests.alignment.modules.batches import dina, dina_head, loaded_pairs, lrm, taught_pairs
from tests.distributed.strategies import STRATEGIES
from tests.tiny_pipelines import pipeline_folder


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


class EveryNth(Sampler[int]):
    """Rank r of n takes items r, r + n, …, so the ranks' batches together are one process's batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        rank, size = world()
        return iter(range(rank, self.count, size))

    def __len__(self) -> int:
        return self.count // world()[1]


def sgd(groups: Any) -> SGD:
    return SGD(groups, lr=0.01)


def adamw(groups: Any) -> AdamW:
    return AdamW(groups, lr=1e-3, eps=1e-4)  # a large eps: where a gradient is rounding error, its sign is no step


CHECKPOINTED = {"gradient_checkpointing": True}
MODELS: dict[str, Callable[[], RewardModule]] = {
    "lrm both": lambda: lrm("sd15", loss=LRMLoss("both"), optimizer=sgd, backbone=CHECKPOINTED),
    "lrm batch": lambda: lrm("sd15", loss=LRMLoss("batch"), optimizer=sgd),
    "lrm sdxl": lambda: lrm("sdxl", loss=LRMLoss("both"), optimizer=sgd, backbone={"tuning": "lora"}),
    "lrm on dit": lambda: lrm("sd35", optimizer=sgd),
    "dina": lambda: dina("sd35", optimizer=sgd, backbone={"text_taps": (1,), **CHECKPOINTED}),
    "dina ties": lambda: dina("sd35", loss=TieLoss(), optimizer=sgd),
    "dina taught": lambda: dina("sd35", loss=RegressionDistillation(), optimizer=sgd),
    "dina full": lambda: dina("sd35_no_t5", optimizer=sgd, backbone={"tuning": "full", **CHECKPOINTED}),
    "dina on unet": lambda: dina("sd15", dina_head, optimizer=sgd),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.05},
}
CASES = [
    *((name, "plain") for name in MODELS),
    ("lrm both", "accumulated"),
    ("dina", "clipped"),
    ("lrm both", "clipped"),
]


def write_pipelines() -> None:
    """Before there is a process group: in one, transformers leaves saving to rank 0."""
    for name in ("sd15", "sdxl", "sd35", "sd35_no_t5"):
        pipeline_folder(name)


class Norms(Callback):
    """Norm of all gradients before each step, after clipping."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = [whole_tensor(p.grad) for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.values.append(torch.stack([grad.norm() for grad in grads]).norm().item())


def make_trainer(folder: Path, strategy: Any = "auto", **options: Any) -> Trainer:
    """One process, or two where a strategy is named; one epoch, nothing printed, nothing saved."""
    return Trainer(
        strategy=strategy,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[DurableCheckpointIO()],
        **{
            "accelerator": "cpu",
            "devices": 1 if strategy == "auto" else 2,
            "max_epochs": 1,
            "enable_checkpointing": False,
            **options,
        },
    )


def fit(module: RewardModule, trainer: Trainer, resume: Path | None = None) -> None:
    """Train on eight pairs, four at a step over all processes; one validation at the end of each epoch."""
    data = loader(4 // trainer.world_size, taught=isinstance(module.loss, TargetLoss))
    trainer.fit(module, data, data, ckpt_path=resume, weights_only=True)


def loader(batch_size: int, taught: bool = False) -> DataLoader:
    pairs = taught_pairs(8) if taught else loaded_pairs(8)
    return DataLoader(pairs, batch_size, sampler=EveryNth(8), collate_fn=collate_pairs)


def outcome(module: RewardModule, trainer: Trainer) -> dict[str, Any]:
    """Weights that train, whole, and what was logged."""
    weights = {name: whole_tensor(p) for name, p in module.named_parameters() if p.requires_grad}
    return {"weights": weights, "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()}}


def train_case(name: str, setting: str, folder: Path, strategy: Any = "auto") -> dict[str, Any]:
    norms = Norms()
    module, trainer = MODELS[name](), make_trainer(folder, strategy, callbacks=[norms], **SETTINGS[setting])
    fit(module, trainer)
    return {**outcome(module, trainer), "norms": norms.values}


def all_cases(folder: Path) -> dict[str, Any]:
    """On ranks: every case, with DDP and with FSDP2."""
    write_pipelines()
    return {
        f"{kind} {name} {setting}": train_case(name, setting, folder, STRATEGIES[kind]())
        for name, setting in CASES
        for kind in ("ddp", "fsdp2")
    }


def small_model() -> RewardModule:
    return dina("sd35_no_t5", optimizer=adamw, levels=None)


def saved_run(folder: Path, strategy: Any = "auto", resume: Path | None = None, **options: Any) -> dict[str, Any]:
    """Two epochs with average and checkpoints ``epoch=N`` in ``folder``, and what is left in the end."""
    module, average = small_model(), TrainableEMA(decay=0.5)
    saver = ModelCheckpoint(
        folder, "{epoch}", monitor="val/margin", mode="max", save_top_k=-1, enable_version_counter=False
    )
    callbacks = [average, saver, TrainableCheckpoint()]
    trainer = make_trainer(folder, strategy, max_epochs=2, callbacks=callbacks, enable_checkpointing=True, **options)
    fit(module, trainer, resume)
    return {
        **outcome(module, trainer),
        "average": {name: whole_tensor(value) for name, value in average.average.items()},
        "moments": moments(module, trainer),
        "best": saver.best_model_score.item(),
    }


def moments(module: RewardModule, trainer: Trainer) -> dict[str, Tensor]:
    """First moments of AdamW by the weights' names."""
    state = trainer.optimizers[0].state
    return {name: whole_tensor(state[p]["exp_avg"]) for name, p in module.named_parameters() if p in state}


def validated(folder: Path, checkpoint: Path, strategy: Any = "auto", average: bool = True) -> float:
    """Margin on the eight pairs of the weights in ``checkpoint``, or of their average."""
    callbacks = [TrainableCheckpoint(), *([TrainableEMA()] if average else [])]
    trainer = make_trainer(folder, strategy, callbacks=callbacks)
    data = loader(4 // trainer.world_size)
    trainer.validate(small_model(), data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return trainer.callback_metrics["val/margin"].item()
