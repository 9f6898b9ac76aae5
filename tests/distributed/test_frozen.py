"""Frozen weights on several ranks: each machine holds them once, and ranks with other weights are refused."""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import save_file

from latentreward.apps.cli import main
from latentreward.apps.commands.fit import ranks_per_machine
from latentreward.core.errors import InputError
from latentreward.core.storage.weight_files import (
    StoredTensor,
    map_weights,
    own_folder,
    processes_here,
    release_shared,
    shared,
    sharing_between,
)
from latentreward.diffusion import sd_tiny
from latentreward.reward import CLIPProjectionHead, LRMLoss, LRMModule
from latentreward.reward.modules.training import share_frozen
from latentreward.tinyworld.writers import write_pickapic
from tests.distributed.ranks import on_ranks
from tests.marks import release_after


class MappedMemory(Callback):
    """Bytes of this process in shared weight files at the end of training, summed by kind."""

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        sums = dict.fromkeys(("Rss", "Pss", "Private_Dirty"), 0)
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = "/latentreward-" in line
            elif inside and (name := line.partition(":")[0]) in sums:
                sums[name] += 1024 * int(line.split()[1])
        frozen = [parameter.nbytes for parameter in trainer.model.parameters() if not parameter.requires_grad]
        rank, folder = trainer.global_rank, Path(trainer.default_root_dir)
        torch.save({**sums, "frozen": sum(frozen)}, folder / f"memory{rank}.pt")


def aligned_policy(folder: Path) -> dict[str, Any]:
    """On two ranks: Diffusion-DPO, with frozen weights in bfloat16 whose files are float16."""
    options = [
        "--data.batch_size=4",
        "--data.num_workers=0",
        f"--data.root={folder / 'pairs'}",
        "--data.train_pairs=16",
    ]
    quick = ["--data.val_pairs=8", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    quick += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={folder}"]
    two += ["--model.policy.frozen_dtype=bfloat16", "--trainer.precision=bf16-mixed"]
    seen = "--trainer.callbacks+=tests.distributed.test_frozen.MappedMemory"
    main(["fit", "--config=configs/align/diffusion_dpo_tiny.yaml", *options, *quick, *two, seen])
    return {}


def aligned_by_a_reward(folder: Path) -> dict[str, Any]:
    """On two ranks: LPO with a reward whose files are float32, under bf16-mixed."""
    options = [f"--model.reward.path={folder / 'reward'}", "--model.reward.share=never", "--data.batch_size=4"]
    quick = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={folder}"]
    two += ["--model.policy.frozen_dtype=bfloat16", "--trainer.precision=bf16-mixed"]
    seen = "--trainer.callbacks+=tests.distributed.test_frozen.MappedMemory"
    main(["fit", "--config=configs/align/lpo_tiny.yaml", *options, *quick, *two, seen])
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("run", release_after(1, ["aligned_policy", "aligned_by_a_reward"]))
def test_a_machine_holds_frozen_weights_once(run: str, tmp_path: Path) -> None:
    write_pickapic(tmp_path / "pairs", {"train": 16, "validation": 8})
    model = LRMModule(sd_tiny(), CLIPProjectionHead, LRMLoss(), seed=0).model
    model.save_pretrained(tmp_path / "reward", base="sd_tiny")
    on_ranks(f"tests.distributed.test_frozen:{run}", tmp_path)
    found = [torch.load(tmp_path / f"memory{rank}.pt") for rank in range(2)]
    for memory in found:
        assert memory["Private_Dirty"] == 0  # no page was written to
        assert memory["Rss"] >= 0.95 * memory["frozen"]
    assert sum(memory["Pss"] for memory in found) <= 1.1 * max(memory["Rss"] for memory in found)


def whole(path: Path) -> list[tuple[StoredTensor, torch.dtype]]:
    return [(place, torch.bfloat16) for place in map_weights([path]).places.values()]


def test_converted_weights_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = whole(tmp_path / "x.safetensors")
    one, two = shared(wanted), shared(wanted)
    (kept,) = (path for path in own_folder().iterdir() if not path.suffix)
    for place, mapped, again in zip(wanted, one, two, strict=True):
        expected = place[0].read().bfloat16()
        assert torch.equal(mapped, expected)
        assert mapped.data_ptr() % 64 == 0
        mapped.zero_()  # private to whom writes
        assert torch.equal(again, expected)
    release_shared(remove=True)
    assert not kept.exists()
    assert [*own_folder().iterdir()] == []
    assert torch.equal(two[0], wanted[0][0].read().bfloat16())  # what is mapped stays


def test_without_room_each_process_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_file({"a": torch.randn(2**18)}, tmp_path / "x.safetensors")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, before[1]))
    try:
        assert shared(whole(tmp_path / "x.safetensors")) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.fullmatch(r"\S+: File too large; each process holds 0.0 GB of its own instead", caplog.messages[0])
    assert [path.suffix for path in own_folder().iterdir()] in ([".lock"], [])


@pytest.mark.slow
def test_a_program_without_a_trainer_leaves_no_file(tmp_path: Path) -> None:
    """Nor does a run that fails before training; what a killed process has left is removed by the next one."""
    save_file({"a": torch.randn(9)}, tmp_path / "x.safetensors")
    folder = tmp_path / f"latentreward-{os.getuid()}"
    folder.mkdir(mode=0o700)
    for name, age in (("old", 7200), ("old.partial", 7200), ("fresh", 0)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (0, time.time() - age))
    code = "from tests.distributed.test_frozen import *; shared(whole(Path(sys.argv[1])))"
    code += "; print(*os.listdir(own_folder()))"
    command = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 3  # the file, its lock, and the fresh one
    assert [path.name for path in folder.iterdir()] == ["fresh"]


def test_files_are_removed_under_their_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that is writing the same file keeps its lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_file({"a": torch.randn(9)}, tmp_path / "x.safetensors")
    shared(whole(tmp_path / "x.safetensors"))
    (lock,) = own_folder().glob("*.lock")
    with ThreadPoolExecutor(1) as pool, FileLock(lock):  # the lock is freed before the pool waits
        released = pool.submit(release_shared, remove=True)
        time.sleep(0.2)
        assert lock.exists()
        assert not released.done()
    assert [*own_folder().iterdir()] == []


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own_folder().chmod(0o777)
    with pytest.raises(PermissionError, match="can be written to by others; remove it, or set TMPDIR"):
        own_folder()


def other_weights(folder: Path) -> str:
    """On two ranks, of which one has another frozen weight: the error."""
    rank = int(os.environ["LOCAL_RANK"])

    class Frozen(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(2, 2).requires_grad_(False)
            self.base.weight.fill_(rank)

        def setup(self, stage: str) -> None:
            share_frozen(self, self.trainer)

    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, default_root_dir=folder)
    with pytest.raises(InputError, match="the ranks have loaded different frozen weights") as caught:
        trainer.fit(Frozen())
    return str(caught.value)


@pytest.mark.slow
def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    assert len(set(on_ranks("tests.distributed.test_frozen:other_weights", tmp_path))) == 1


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"devices": 3}, 3),
        ({"devices": "2"}, 2),
        ({"devices": [0, 4]}, 2),
        ({"devices": "0,1,5"}, 3),
        ({"devices": "2,"}, 1),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
    ],
)
def test_processes_of_a_trainer(settings: dict[str, Any], processes: int) -> None:
    assert ranks_per_machine(Namespace(**settings)) == processes
    with sharing_between(processes):
        assert processes_here() == processes
    assert processes_here() == 1
