"""A run of two ranks, each with a reward server of its own, of which one fails."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from latentreward.callbacks import ExactResume, GracefulStop
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD

from latentreward.alignment import HTTPReward, PolicySource, Sampling, TrajectoryGRPOModule
from latentreward.data.alignment.prompts import PromptLoaders
from latentreward.diffusion import LoRA
from latentreward.reward import RemoteError, RemoteServer
from tests.reward.remote.judges import hangs_up, judging
from tests.tiny_pipelines import source_of

PROMPTS = ["a red circle on a black background", "two blue squares on a white background", "a large green cross"]


def train(folder: Path, server: RemoteServer, checkpoint: Path | None = None) -> dict[str, Tensor]:
    """Weights after some steps, with a rollout of a prompt on each rank before every other step."""
    policy = PolicySource(source_of("sd15"), lora=LoRA(rank=2, alpha=2))
    options: dict[str, Any] = {"sampling": Sampling(2), "num_trajectories": 3, "guidance_scale": 1.0, "seed": 1}
    module = TrajectoryGRPOModule(policy, HTTPReward(server), optimizer=partial(SGD, lr=0.1), **options)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[GracefulStop(), ExactResume(seed=1)],
        use_distributed_sampler=False,
    )
    data = PromptLoaders(PROMPTS, batch_size=3, prompts_per_rollout=1, batches_per_epoch=4, seed=2)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def stop_and_resume(folder: Path) -> dict[str, Any]:
    """Weights without a failure, the message of a run whose second rank gets no scores, and weights of the resumed."""
    source_of("sd15")  # while there is no process group: in one, transformers leaves saving to rank 0
    message = ""
    with judging() as judge:
        server = RemoteServer(judge.url, retry_s=0.0)
        whole = train(folder / "whole", server)
        if os.environ["LOCAL_RANK"] == "1":
            judge.faults += [None, None, hangs_up]
        try:
            train(folder / "stopped", server)
        except RemoteError as error:
            message = str(error)
        resumed = train(folder / "stopped", server, folder / "stopped" / "checkpoints" / "last.ckpt")
    return {"whole": whole, "resumed": resumed, "message": message}
