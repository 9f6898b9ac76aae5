"""``latentreward export``: the LoRA that a run has trained, for diffusers, for ComfyUI, or merged into its pipeline."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from latentreward.errors import InputError
from latentreward.settings.functions import run_plain_function

Format = Literal["diffusers", "kohya", "merged"]


def export(
    checkpoint: Path,
    output: Path,
    format: Format = "diffusers",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write what an alignment run has trained in the format of other programs.

    Args:
        checkpoint: File or folder of any alignment run. To export the average of TrainableEMA, first write it with
            ``latentreward consolidate --average=true``.
        output: Folder to write.
        format: ``diffusers`` is a LoRA for ``load_lora_weights``; ``kohya`` one for ComfyUI and programs that read
            kohya's names; ``merged`` a whole pipeline for ``from_pretrained``, which needs no LoRA: the call that loads
            it is printed.
        dtype: Precision of the weights.
        overwrite: Whether ``output`` may exist.

    Raises:
        InputError: If the checkpoint is damaged or of no alignment run, or ``output`` exists.
    """
    from latentreward.export import TrainedLoRA, loading_call, write_kohya, write_merged
    from latentreward.policies.checkpoint import read_policy_adapter

    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    saved = read_policy_adapter(checkpoint)
    precision = getattr(torch, dtype)
    if format == "merged":
        written = write_merged(TrainedLoRA.of_checkpoint(saved), saved.source.pipeline(), output, precision)
    else:
        lora = TrainedLoRA.of_checkpoint(saved, precision)
        written = lora.write_diffusers(output) if format == "diffusers" else write_kohya(lora, output)
    size = sum(path.stat().st_size for path in (written, *written.rglob("*")) if path.is_file())
    print(f"{written}: {size / 1e6:.1f} MB" + (f"; load it by {loading_call(written)}" if format == "merged" else ""))


run = partial(run_plain_function, export, bare=2)
