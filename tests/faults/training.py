"""A short training run of the command line as processes of its own, for tests that break it off."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.processes import Forked, start, start_ranks

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
PAIRS, BATCH = 28, 4
LIMIT_S = 400.0
Batch = tuple[int, int, int]
"""Rank, epoch and number of a batch."""


@dataclass
class TrainingRun:
    """One training run: LoRA with dropout, EMA, a schedule, accumulation, validation in mid-epoch, loader workers.

    Attributes:
        folder: Of the run.
        data: Folder of the pairs, shared between runs.
        processes: Ranks.
        options: More settings of the command line.
        save_every: Optimiser steps between checkpoints.
        resume: Whether ``--ckpt_path last`` is given.
    """

    folder: Path
    data: Path
    processes: int = 1
    options: Sequence[str] = ()
    save_every: int = 1
    resume: bool = True
    ranks: Sequence[Forked] = field(default=(), init=False)

    def arguments(self) -> list[str]:
        """The command line, after the name of the program."""
        settings = {
            "data.root": self.data,
            "data.train_pairs": PAIRS,
            "data.val_pairs": BATCH,
            "data.batch_size": BATCH // self.processes,
            "data.num_workers": 1,
            "model.backbone.lora.dropout": 0.1,
            "model.backbone.num_layers": 1,
            "model.backbone.visual_taps": [1],
            "model.backbone.text_taps": [1],
            "model.eval_sigmas": [0.5],
            "model.ensemble_sigmas": [0.2],
            "model.lr_scheduler": "WarmupSchedule",
            "model.lr_scheduler.decay": "cosine",
            "model.lr_scheduler.total_steps": 1000,
            "trainer.max_steps": -1,
            "trainer.max_epochs": 2,
            "trainer.accumulate_grad_batches": 2,
            "trainer.val_check_interval": 3,
            "trainer.devices": self.processes,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.num_sanity_val_steps": 0,
            "trainer.logger.save_dir": self.folder,
            "trainer.default_root_dir": self.folder,
            "exact_resume.seed": 7,
        }
        return [
            "fit",
            *(
                f"--config={CONFIGS}/{name}.yaml"
                for name in ("model/dina_lrm_tiny", "data/tinyworld_hpdv3", "trainer/cpu")
            ),
            *(f"--{name}={value}" for name, value in settings.items()),
            *(["--trainer.strategy=ddp"] if self.processes > 1 else []),
            "--trainer.callbacks=[]",
            "--trainer.callbacks+=ModelCheckpoint",
            f"--trainer.callbacks.every_n_train_steps={self.save_every}",
            "--trainer.callbacks.save_last=true",
            "--trainer.callbacks.save_top_k=0",
            f"--trainer.callbacks.dirpath={self.folder}/checkpoints",
            "--trainer.callbacks+=TrainableEMA",
            "--trainer.callbacks+=pair_log.PairLog",
            f"--trainer.callbacks.folder={self.folder}",
            *self.options,
            *(["--ckpt_path=last"] if self.resume else []),
        ]

    def start(self, **environment: str) -> None:
        """Start it, or go on with it, rank by rank, as a cluster's launcher does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = {"cwd": HERE, "session": True, "output": self._output}
        self.ranks = start_ranks(self.arguments(), self.processes, environment, **place)

    def launch(self) -> None:
        """Start it as a user does, one process; Lightning starts the other ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks = [start(self.arguments(), cwd=HERE, session=True, output=self._output)]

    def has_ended(self) -> bool:
        """Whether one of the processes that were started here runs no more."""
        return any(rank.poll() is not None for rank in self.ranks)

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit statuses of the processes that were started here; whatever hangs is killed, and an error."""
        end = time.monotonic() + limit_s
        try:
            return [rank.wait(max(0.0, end - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {self.output()[-2000:]}") from None
        finally:
            self.kill_all()

    def kill_all(self) -> None:
        """SIGKILL to every process of the run."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.wait()

    def finish(self, **environment: str) -> None:
        """Run to the end."""
        self.start(**environment)
        assert not any(self.wait()), self.output()[-2000:]

    def output(self) -> str:
        """What the processes have printed."""
        return self._output.read_text()

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of a log file."""
        path = self.folder / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def begun(self, rank: int = 0) -> int:
        """Batches that a rank has begun, repeated ones included."""
        return len(self.lines(f"rank{rank}.jsonl"))

    def wait_for_batches(self, count: int, rank: int = 0) -> int:
        """Wait until a rank has begun ``count`` batches in all, or the run has ended; returns the rank's process id."""
        deadline = time.monotonic() + LIMIT_S
        while self.begun(rank) < count and not self.has_ended():
            assert time.monotonic() < deadline, f"no progress: {self.output()[-2000:]}"
            time.sleep(0.02)
        return self.lines(f"rank{rank}.jsonl")[-1]["pid"]

    def trained_pairs(self) -> dict[Batch, list[str]]:
        """Pairs of each batch; a batch that was taken again after a resume must have had the same."""
        pairs: dict[Batch, list[str]] = {}
        for rank in range(self.processes):
            for line in self.lines(f"rank{rank}.jsonl"):
                key = (rank, line["epoch"], line["batch"])
                assert pairs.setdefault(key, line["pairs"]) == line["pairs"], key
        return pairs

    def pairs_by_step(self) -> dict[tuple[int, int], list[str]]:
        """Pairs of each epoch and optimiser step, over ranks and accumulated batches, sorted."""
        pairs: dict[tuple[int, int], list[str]] = {}
        for name in sorted(path.name for path in self.folder.glob("rank*.jsonl")):
            for line in self.lines(name):
                pairs.setdefault((line["epoch"], line["step"]), []).extend(line["pairs"])
        return {step: sorted(names) for step, names in pairs.items()}

    def checkpoint(self) -> dict[str, Any]:
        """The last checkpoint."""
        return torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)

    def weights(self) -> str:
        """SHA-256 of the final weights, their average, the optimiser's and the schedule's state."""
        checkpoint = self.checkpoint()
        digest = hashlib.sha256()
        average = checkpoint["callbacks"]["TrainableEMA"]["average"]
        moments = {
            f"{number}.{name}": value
            for number, state in checkpoint["optimizer_states"][0]["state"].items()
            for name, value in state.items()
        }
        for part in (checkpoint["state_dict"], average, moments):
            for name in sorted(part):
                digest.update(name.encode() + part[name].contiguous().numpy().tobytes())
        digest.update(json.dumps([checkpoint["lr_schedulers"], checkpoint["global_step"]], default=str).encode())
        return digest.hexdigest()
