"""A run whose reward server fails: it waits or is saved, and ends as if nothing had happened."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from latentreward.callbacks import ExactResume, GracefulStop
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW

from latentreward.alignment import HTTPReward, PolicySource, RewardMixture, Sampling, TrajectoryGRPOModule
from latentreward.apps.serving.settings import bind
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA
from latentreward.reward import RemoteError, RemoteServer
from tests.alignment.modules.simple_reward import FirstChannelReward
from tests.marks import slow_after
from tests.reward.remote.judges import Fault, hangs_up, judging, says
from tests.tiny_pipelines import source_of

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle", "two blue squares on a white background", "a large green cross"]
STEPS = 4
TrainableState = dict[str, torch.Tensor]


def fit(
    folder: Path,
    server: RemoteServer,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    epoch: int = 2,
) -> TrainableState:
    """Train for some steps, with a rollout before every other one; an epoch of two steps begins with a rollout."""
    mixture = RewardMixture([HTTPReward(server), FirstChannelReward(1.0)], normalise="running")
    module = TrajectoryGRPOModule(
        PolicySource(source_of("sd15"), lora=LoRA(2, 2.0)),
        mixture,
        sampling=Sampling(2),
        num_trajectories=3,
        guidance_scale=1.0,
        prompts_at_once=1,
        optimizer=partial(AdamW, lr=1e-2),
        seed=1,
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GracefulStop(), ExactResume(seed=1), *callbacks],
    )
    data = PromptLoaders(PROMPTS, batch_size=6, prompts_per_rollout=2, batches_per_epoch=epoch, seed=2)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == STEPS
    return {**module.state_dict(), **{str(key): slot["exp_avg"] for key, slot in enumerated(trainer)}}


def enumerated(trainer: Trainer) -> Iterator[tuple[int, Any]]:
    return enumerate(trainer.optimizers[0].state.values())  # type: ignore[return-value]


def assert_equal(found: TrainableState, expected: TrainableState) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainableState:
    with judging() as judge:
        state = fit(tmp_path_factory.mktemp("whole"), RemoteServer(judge.url))
        assert len(judge.sizes) == 1 + 2 * STEPS / 2  # a first look, and one request for each prompt of two rollouts
    return state


@contextmanager
def judge_that_is_killed(requests: int, away_s: float) -> Iterator[str]:
    """Address of a judge's process that is killed at a request, and started again on the same port after a while."""
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "tests.reward.remote.judges", str(port)]
    processes = [subprocess.Popen([*command, str(requests)], cwd=ROOT)]

    def restart() -> None:
        processes[0].wait()
        time.sleep(away_s)
        processes.append(subprocess.Popen(command, cwd=ROOT))

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        thread.join(300)
        assert len(processes) == 2, "the judge was not killed and started again"


@pytest.mark.slow
def test_a_server_killed_and_started_again_costs_a_waiting_run_nothing(
    undisturbed: TrainableState, tmp_path: Path
) -> None:
    with judge_that_is_killed(requests=2, away_s=1.0) as url:
        assert_equal(fit(tmp_path, RemoteServer(url, retry_s=300.0)), undisturbed)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "fault", "step"),
    slow_after(1, [(3, hangs_up, 2), (1, says(200, {"scores": [float("nan")] * 3}), 0), (4, says(503), 2)]),
)
def test_a_run_that_stops_is_saved_in_the_middle_of_a_rollout(
    requests: int, fault: Fault, step: int, undisturbed: TrainableState, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    with judging(faults=[None] * requests + [fault]) as judge:
        server = RemoteServer(judge.url, retry_s=0.0)
        told = rf"reward server {judge.url}: .*; saved optimiser step {step}; go on with --ckpt_path {path}"
        with pytest.raises(RemoteError, match=told) as raised:
            fit(tmp_path, server)
        assert str(raised.value).isprintable()
        assert_equal(fit(tmp_path, server, path), undisturbed)


@pytest.mark.slow
def test_a_rollout_in_the_middle_of_an_epoch_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    with judging() as judge:
        server = RemoteServer(judge.url, retry_s=0.0)
        whole = fit(tmp_path / "whole", server, epoch=3)
        judge.faults += [None] * 3 + [hangs_up]
        with pytest.raises(RemoteError, match="saved optimiser step 2"):
            fit(tmp_path, server, epoch=3)
        assert_equal(fit(tmp_path, server, path, epoch=3), whole)
