"""``latentreward export``: write a trained policy or reward in the format of another program."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from latentreward.core.contracts import PathText
from latentreward.core.errors import InputError, errors_at
from latentreward.core.settings.functions import run_function
from latentreward.core.storage.durable import check_writable
from latentreward.reward import ModelSource, RewardModel
from latentreward.reward.scoring.exporting import RewardFormat, export_reward

PolicyFormat = Literal["diffusers", "kohya", "peft", "merged"]


def export(
    checkpoint: Path,
    output: Path,
    format: Literal[PolicyFormat, RewardFormat] = "diffusers",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
    base_name: str | None = None,
    run_config: PathText | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> None:
    """Write a policy trained by an alignment run, or a reward model, in the format of another program.

    Args:
        checkpoint: Policy: checkpoint of any alignment run, a file or a folder of shards. To export the average of
            TrainableEMA, first write it with ``latentreward consolidate --average=true``. Reward: checkpoint or folder
            of a run, model folder, or hub id.
        output: Folder to write.
        format: Policy: ``diffusers`` writes a LoRA for ``load_lora_weights``; ``kohya`` a LoRA for ComfyUI and other
            programs that read kohya's names; ``peft`` a folder for ``PeftModel.from_pretrained``; ``merged`` a whole
            pipeline with the LoRA merged into its weights, and prints the call that loads it. Reward:
            ``diffusion-rm`` is the layout of DiNa-LRM's authors, ``lpo`` that of LRM's authors.
        dtype: Policy: precision of the written weights. A reward is written in float32.
        overwrite: Whether to replace ``output`` if it exists.
        base_name: Reward: name of the base that is written to diffusion-rm's config.json, e.g. a hub id; by default the
            hub id of the base, or the name of its folder.
        run_config: Reward: config file of its training run; by default the one beside the checkpoint.
        trust_remote_code: Whether to import classes outside this package that the reward's settings or the policy's
            checkpoint name; importing runs their code.
        loading: Reward: see :class:`~latentreward.reward.ModelSource`.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; set overwrite: true or choose another name")
    check_writable(output)
    source = ModelSource(str(checkpoint), config=run_config, trust_remote_code=trust_remote_code, **loading)
    if format in get_args(RewardFormat):
        if dtype != "float32":
            raise InputError(f"dtype={dtype} is for policies; a reward is written in float32: leave it out")
        if base_name is not None and format == "lpo":
            raise InputError("base_name is for diffusion-rm; lpo names no base: leave it out")
        model = RewardModel.from_pretrained(source)
        lines, written = export_reward(model, output, cast(RewardFormat, format), base_name), output
    else:
        settings = {"base_name": base_name, "run_config": run_config, **loading}
        if given := [name for name, value in settings.items() if value is not None]:
            raise InputError(f"{given[0]} is for rewards, but format={format} is for policies; leave it out")
        from latentreward.alignment import loading_call

        precision = getattr(torch, dtype)
        written = export_policy(checkpoint, output, cast(PolicyFormat, format), precision, trust_remote_code)
        lines = [f"load it by {loading_call(written)}"] if format == "merged" else []
    size = sum(path.stat().st_size for path in (written, *written.rglob("*")) if path.is_file())
    print("\n".join([f"{written}: {size / 1e6:.1f} MB", *lines]))


def export_policy(
    checkpoint: Path, output: Path, format: PolicyFormat, precision: torch.dtype, trusted: bool = False
) -> Path:
    """Write the policy of an alignment run, and return the written file or folder."""
    from latentreward.alignment import TrainedLoRA, write_kohya, write_merged
    from latentreward.alignment.policies.checkpoint import read_policy_adapter

    with errors_at(f"format={format} is for policies (for a reward set {' or '.join(get_args(RewardFormat))}): "):
        saved = read_policy_adapter(checkpoint, trusted)
    if format == "merged":
        return write_merged(TrainedLoRA.of_checkpoint(saved), saved.source.pipeline(), output, precision)
    lora = TrainedLoRA.of_checkpoint(saved, precision)
    write = {"diffusers": lora.write_diffusers, "peft": lora.write_peft, "kohya": partial(write_kohya, lora)}[format]
    return write(output)


run = partial(run_function, export, bare=2, classes=False)
