"""A module of a few milliseconds whose data are its own rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from latentreward.callbacks import ExactResume
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentreward.core.contracts import EditPrompt, ImageRef, PromptBatch, RolloutStatistics, StepPairs, take_rows
from latentreward.core.running import pair_generator
from latentreward.data.alignment.prompts import PromptLoaders

PROMPTS = tuple(f"prompt {number}" for number in range(7))
PICTURES = ImageRef("in bytes", data=b"not decoded"), ImageRef("a.png", path=Path("in/a.png"), root=Path("in"))
EDITS = tuple(
    EditPrompt("make it red" if number % 2 else "move it", PICTURES[: 1 + number // 2]) for number in range(4)
)
STEPS = 3


class RollingModule(LightningModule):
    """Rolls out states that depend on its weight; keeps a pair of about every second."""

    rollout_statistics: RolloutStatistics | None = None
    experience: type[StepPairs] = StepPairs

    def __init__(self, keep: float = 0.5, eta: float = 1.0) -> None:
        super().__init__()
        self.settings = {"sampling.eta": eta}
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        self.keep = keep
        self.seen: list[tuple[int, list[str]]] = []
        self.rolled_out: list[list[str]] = []
        self.prepared: list[str] = []

    def roll_out(self, prompts: PromptBatch) -> StepPairs | None:
        self.rolled_out.append(list(prompts.keys))
        names = [
            (prompt, f"{key}/{step}") for step in range(STEPS) for prompt, key in zip(*self._of(prompts), strict=True)
        ]
        draws = torch.stack([torch.rand(5, generator=pair_generator(0, "row", 0, key)) for _, key in names])
        kept = draws[:, 4] < self.keep
        shape = (STEPS, len(prompts))
        self.rollout_statistics = RolloutStatistics(
            torch.arange(STEPS),
            draws[:, :2].T.reshape(2, *shape).transpose(0, 1),
            draws[:, 3].view(shape),
            kept.view(shape),
        )
        states = draws[:, :2] * self.weight.detach()
        pairs = self.experience(
            tuple(key for _, key in names),
            tuple(prompt for prompt, _ in names),
            states,
            draws[:, 2],
            states + 1,
            states - 1,
            draws[:, 3],
        )
        return take_rows(pairs, kept.nonzero().flatten().tolist()) if kept.any() else None

    def _of(self, prompts: PromptBatch) -> tuple[Sequence[str], Sequence[str]]:
        return prompts.prompts, prompts.keys

    def check_experience(self, rows: object) -> None:
        assert len(rows)

    def rollout_settings(self) -> dict[str, object]:
        return self.settings

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        self.prepared = list(prompts)

    def describe_rollouts(self) -> str:
        return "gaps are small"

    def training_step(self, batch: StepPairs, batch_idx: int) -> Tensor:
        assert set(batch.prompts) <= set(self.prepared)
        self.seen.append((self.current_epoch, list(batch.keys)))
        return ((batch.latents * self.weight).sum(dim=1) - batch.gap).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


@dataclass(frozen=True)
class OwnRows(StepPairs):
    """A record that the package does not know, with a field that is given at times."""

    bonus: Tensor | None = None


class OwnRolling(RollingModule):
    """The same with rows of its own."""

    experience = OwnRows

    def roll_out(self, prompts: PromptBatch) -> OwnRows | None:
        rows = super().roll_out(prompts)
        return rows and replace(rows, bonus=rows.gap + 1)

    def training_step(self, batch: OwnRows, batch_idx: int) -> Tensor:
        assert torch.equal(batch.bonus, batch.gap + 1)
        return super().training_step(batch, batch_idx)


def make_trainer(folder: Path, callbacks: Sequence[Callback] = (), strategy: Any = "auto", **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        callbacks=[ExactResume(seed=5), *callbacks],
        **{
            "default_root_dir": folder,
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **options,
        },
    )


def fit(
    trainer: Trainer, checkpoint: Path | None = None, module: RollingModule | None = None, **options: Any
) -> RollingModule:
    """Over all processes, four rows at a batch and two prompts at a rollout."""
    module = module or RollingModule()
    settings = {"batch_size": 4 // trainer.world_size, "prompts_per_rollout": 2 // trainer.world_size}
    data = PromptLoaders(**{"prompts": PROMPTS, **settings, "batches_per_epoch": 5, "seed": 3, **options})
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


class SaveAlways(Callback):
    """A checkpoint wherever Lightning's own or a user's callback may write one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[tuple[Path, int]] = []

    def save(self, trainer: Trainer, module: RollingModule, place: str) -> None:
        path = self.folder / f"{len(self.paths):03d}-{place}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append((path, len(module.seen)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.save(trainer, pl_module, "batch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, pl_module, "epoch")
