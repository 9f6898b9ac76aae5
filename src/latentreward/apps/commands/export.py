"""``latentreward export``: write a trained policy in the format of another program."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from latentreward.core.errors import InputError
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import check_writable


def export(
    checkpoint: Path,
    output: Path,
    format: Literal["diffusers", "kohya", "peft", "merged"] = "diffusers",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a policy trained by an alignment run in the format of another program; ``publish`` writes rewards.

    Args:
        checkpoint: Checkpoint of any alignment run, a file or a folder of shards. To export the average of
            TrainableEMA, first write it with ``latentreward consolidate --average=true``.
        output: Folder to write.
        format: ``diffusers`` writes a LoRA for ``load_lora_weights``; ``kohya`` a LoRA for ComfyUI and other
            programs that read kohya's names; ``peft`` a folder for ``PeftModel.from_pretrained``; ``merged`` a whole
            pipeline with the LoRA merged into its weights, and prints the call that loads it.
        dtype: Precision of the written weights.
        overwrite: Whether to replace ``output`` if it exists.
        trust_remote_code: Whether to import classes outside this package that the policy's checkpoint names; importing
            runs their code.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    check_writable(output)
    from latentreward.alignment import TrainedLoRA, loading_call, write_kohya, write_merged
    from latentreward.alignment.policies.checkpoint import read_policy_adapter

    saved, precision = read_policy_adapter(checkpoint, trust_remote_code), getattr(torch, dtype)
    if format == "merged":
        written = write_merged(TrainedLoRA.of_checkpoint(saved), saved.source.pipeline(), output, precision)
    else:
        lora = TrainedLoRA.of_checkpoint(saved, precision)
        write = {"diffusers": lora.write_diffusers, "peft": lora.write_peft, "kohya": partial(write_kohya, lora)}
        written = write[format](output)
    size = sum(path.stat().st_size for path in (written, *written.rglob("*")) if path.is_file())
    print(f"{written}: {size / 1e6:.1f} MB")
    if format == "merged":
        print(f"load it by {loading_call(written)}")


run = partial(run_function, export, bare=2, classes=False)
