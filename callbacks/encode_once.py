"""Callback that frees the text encoders at the start of a run, once its prompts are encoded."""

import math
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from latentreward.callbacks.checkpoints import TrainableCheckpoint
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from latentreward.alignment import AlignmentModule, Policy
from latentreward.alignment.rewards.latent import LatentScorer
from latentreward.core.contracts import Conditioning, PathText, like_prompt
from latentreward.core.errors import InputError
from latentreward.core.storage.durable import write_errors_named
from latentreward.diffusion.encoders.prompts import PromptEncoder, equal_lengths
from latentreward.diffusion.encoders.stored_prompts import StoredPrompts
from latentreward.reward import RewardModel

AT_ONCE = 16  # prompts that are encoded at once; on one core, 32 at once took longer at widths of 128 and 256
KEPT = "free some space, or set EncodeOnce's folder"  # remedy in messages about the file of encoded prompts


class EncodeOnce(Callback):
    """Callback that encodes all prompts before the first step, and frees the text encoders of policy and reward.

    For a reward that trains on cached prompts (``latentreward cache`` with ``encoder.text``) nothing is encoded.

    Encoded prompts lie in a file without a name, which the ranks of a machine write together and map: the disk holds it
    until the run ends or is killed. A row takes 1.7 MB for SD3.5 with 128 T5 tokens in bfloat16, and 0.1 MB
    for SD1.5. T5 then no longer takes 9.5 GB of each GPU. The encoded prompts are those of ``data.prompts``, those of
    callbacks with ``prompts``, and the empty prompt, where a text encoder sees pictures one with those of each edit.
    Results equal those without this callback, except in the last bits, because prompts are encoded in batches.

    Args:
        folder: Folder for the file while it is written; null takes the run's ``trainer.default_root_dir``.

    Example:
        ``--trainer.callbacks+=EncodeOnce``
    """

    def __init__(self, folder: PathText | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        cached = isinstance(getattr(pl_module, "model", None), RewardModel) and getattr(data, "cached_text", False)
        if not cached and not isinstance(pl_module, AlignmentModule):
            raise InputError(
                f"EncodeOnce: {type(pl_module).__name__} trains on prompts that are not encoded yet; cache them by "
                "`latentreward cache` with encoder.text, or leave it out"
            )
        if not any(isinstance(one, TrainableCheckpoint) for one in trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError(
                "EncodeOnce: without text encoders a run cannot resume from checkpoints of all weights; add "
                "TrainableCheckpoint to trainer.callbacks"
            )
        if not cached and not isinstance(getattr(data, "prompts", None), tuple):
            name = type(data).__name__ if data else "the data"
            raise InputError(
                f"EncodeOnce: {name} does not list its prompts before the run, as PromptDataModule does; leave it out"
            )
        encoders = [] if cached else [encoder_of(owner) for owner in owners(pl_module)]  # caches check theirs
        if any(weight.requires_grad for encoder in encoders if encoder for weight in encoder.parameters()):
            raise InputError("EncodeOnce: a text encoder trains, so that its results change; leave EncodeOnce out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(getattr(pl_module, "model", None), RewardModel):
            backbone = pl_module.model.backbone
            if (encoder := backbone.text_encoder) is not None and not isinstance(encoder, StoredPrompts):
                backbone.text_encoder = StoredPrompts(encoder, (), None, pl_module.device, "use cached prompts")
                tell_freed(encoder, "prompts are cached")
            return
        holders = [getattr(trainer, "datamodule", None), *trainer.callbacks]  # type: ignore[attr-defined]
        uncond = [owner.family.uncond_prompt for owner in owners(pl_module) if isinstance(owner, Policy)]
        asked = [prompt for holder in holders for prompt in getattr(holder, "prompts", ())]
        # Runs with one folder must not write to each other's files.
        run = trainer.strategy.broadcast(f"{socket.gethostname()}-{os.getpid()}")
        folder, stored = Path(self.folder or trainer.default_root_dir), dict[PromptEncoder, StoredPrompts]()
        for owner in owners(pl_module):
            encoder = encoder_of(owner)
            if encoder is None or isinstance(encoder, StoredPrompts):
                continue
            if encoder not in stored:
                empty = ["", *uncond]
                if encoder.sees_sources:  # none without pictures: ranks would not call the sharded vision tower alike
                    empty = [like_prompt(text, prompt) for text in empty for prompt in asked]
                prompts = list(dict.fromkeys([*empty, *asked]))
                path = folder / f".prompts-{run}-{trainer.node_rank}-{len(stored)}"
                table = encoded(owner, prompts, path, trainer)
                stored[encoder] = StoredPrompts(encoder, prompts, table, pl_module.device)
                size = sum(tensor.nbytes for tensor in columns_of(table).values())
                tell_freed(encoder, f"{len(prompts)} prompts encoded ({size / 1e9:.2f} GB on disk)")
            if isinstance(owner, Policy):
                owner.text_encoder = stored[encoder]
            else:
                owner.set_text_encoder(stored[encoder])


def tell_freed(encoder: PromptEncoder, reason: str) -> None:
    """Write the size of text encoders that are freed, and why, to the run's output."""
    freed = sum(weight.nbytes for weight in encoder.parameters())
    rank_zero_info(f"EncodeOnce: {reason}, text encoders of {freed / 1e9:.2f} GB freed")


def owners(module: AlignmentModule) -> list[Policy | LatentScorer]:
    """Return the policy, and the latent rewards of a module; a reward may share the policy's text encoder."""
    return [module.policy, *(part for part in module.modules() if isinstance(part, LatentScorer))]


def encoder_of(owner: Policy | LatentScorer) -> PromptEncoder | None:
    """Return the text encoder of a policy or a reward."""
    return owner.text_encoder if isinstance(owner, Policy) else owner.model.backbone.text_encoder


@torch.no_grad()
def encoded(owner: Policy | LatentScorer, prompts: Sequence[str], path: Path, trainer: Trainer) -> Conditioning:
    """Encode ``prompts`` in batches, each rank of a machine its share, into files that all its ranks map.

    All ranks that shard the owner's text encoder call it equally often. ``path`` is the start of the files' names, the
    same for all ranks of the machine.

    Returns:
        The encoded prompts on the CPU, in the order of ``prompts``.
    """
    ranks, rank, barrier = trainer.num_devices, trainer.local_rank, trainer.strategy.barrier

    encoder = encoder_of(owner)
    assert encoder is not None
    encode_text = encoder if isinstance(owner, Policy) else owner.encode_text

    def encode(rows: Sequence[int]) -> dict[str, Tensor]:
        with trainer.precision_plugin.forward_context():
            found = encode_text([prompts[row] for row in rows])
        return columns_of((found.padded(encoder.num_tokens) if encoder.masked else found).to("cpu"))

    names, samples = zip(*encode([0]).items(), strict=True)
    places = [path.with_name(f"{path.name}-{column}") for column in range(len(samples))]
    with write_errors_named(path.parent, KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
    size, free = len(prompts) * sum(sample.nbytes for sample in samples), shutil.disk_usage(path.parent).free
    if not trainer.strategy.reduce_boolean_decision(size <= free, all=True):  # all ranks stop, or none
        raise InputError(
            f"EncodeOnce: {len(prompts)} encoded prompts take {size / 1e9:.1f} GB, and {path.parent} has "
            f"{free / 1e9:.1f} GB left; set its folder, use fewer prompts, or leave EncodeOnce out"
        )
    with write_errors_named(path.parent, KEPT), ExitStack() as opened:
        if rank == 0:
            for place, sample in zip(places, samples, strict=True):
                with place.open("wb") as created:
                    opened.callback(place.unlink, missing_ok=True)
                    created.truncate(len(prompts) * sample.nbytes)
        barrier()
        files = [opened.enter_context(place.open("r+b")) for place in places]
        barrier()
        if rank == 0:  # at once, so that a killed run leaves no file
            for place in places:
                place.unlink()
        batches = equal_lengths(encoder, prompts, AT_ONCE)
        for number in range(math.ceil(len(batches) / ranks)):
            rows = batches[min(number * ranks + rank, len(batches) - 1)]  # past the end the last batch is repeated
            for file, values in zip(files, encode(rows).values(), strict=True):
                for row, value in zip(rows, values, strict=True):
                    file.seek(row * value.nbytes)
                    file.write(memoryview(value.contiguous().view(-1).view(torch.uint8).numpy()))
        for file in files:
            file.flush()
        barrier()
        maps = [torch.from_numpy(np.memmap(file, np.uint8, mode="c")) for file in files]  # pages are read when used
    tables = (
        table.view(one.dtype).view(len(prompts), *one.shape[1:]) for table, one in zip(maps, samples, strict=True)
    )
    return Conditioning(**dict(zip(names, tables, strict=True)))


def columns_of(encoded: Conditioning) -> dict[str, Tensor]:
    """Return the tensors of encoded prompts by the names of their fields."""
    tensors = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
