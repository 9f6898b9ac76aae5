"""Single-file checkpoints: a pipeline's weights in one safetensors file, named as in the authors' code.

diffusers converts the names. Configs and tokenizers, which such a file lacks, and parts whose weights it lacks are read
from a folder of the file's name beside it, or from the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.weight_files import map_weights

ANOTHER_PROCESS = ("v_pred", "ztsnr", "edm_vpred.sigma_max")
"""Tensors by which checkpoints of SDXL say that their noise process is not SDXL's, as ComfyUI's ``supported_models.py``
reads them: NoobAI's v prediction, its levels up to pure noise, CosXL."""


def find_configs(path: Path) -> str:
    """Return the folder beside a checkpoint, or the hub id, with the configs of the kind that diffusers recognises."""
    from diffusers.loaders import single_file_utils

    if path.suffix != ".safetensors":
        raise InputError(
            f"source={str(path)!r} is no safetensors file, and files of other kinds are not read: pickles could run "
            "code; get the .safetensors file, or give a diffusers pipeline folder"
        )
    if (path.with_suffix("") / "model_index.json").is_file():
        return str(path.with_suffix(""))
    tensors = map_weights([path])
    try:
        kind = single_file_utils.infer_diffusers_model_type(tensors)
        configs = str(single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    except (LookupError, NameError, ValueError):  # of shapes that diffusers does not know
        kind, configs = "", ""
    if not configs or (kind == "v1" and single_file_utils.CHECKPOINT_KEY_NAMES["v1"] not in tensors):  # its last guess
        raise InputError(
            f"source={str(path)!r} has tensors of no pipeline that diffusers knows as a single file (such as "
            f"{next(iter(tensors), 'none')}); give a checkpoint of a whole model, or a diffusers pipeline folder"
        )
    unlike = next((name for name in ANOTHER_PROCESS if name in tensors), None)
    if unlike or kind == "v2":
        reason = f"has the tensor {unlike}" if unlike else "is of SD2, whose networks predict noise (base) or v (768)"
        raise InputError(
            f"source={str(path)!r} {reason}, so that the scheduler config of {configs} may be wrong for it; put the "
            f"configs of its own pipeline into {path.with_suffix('')}/"
        )
    return configs


def weights_of_part(path: Path, family: type[Any], config: Any, source: str, part: str) -> dict[str, Tensor] | None:
    """Map the weights of one part of a single-file checkpoint, renamed as in diffusers; None if it has none of them."""
    from diffusers.loaders import single_file_model, single_file_utils

    tensors = map_weights([path])
    try:
        if rules := single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(family.__name__):
            found = rules["checkpoint_mapping_fn"](checkpoint=tensors, config=config)
        elif single_file_utils.is_clip_model_in_single_file(family, tensors):
            found = single_file_utils.create_diffusers_clip_model_from_ldm(family, tensors, part, source).state_dict()
        elif family.__name__ == "T5EncoderModel" and single_file_utils.is_t5_in_single_file(tensors):
            found = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(tensors)
        else:
            return None
    except Exception as error:  # of a file with other names or shapes the converters raise errors of many types
        raise InputError(
            f"cannot load {part} of {path} with the configs of {source}: {type(error).__name__}: {first_line(error)}; "
            f"give the configs of this model in {path.with_suffix('')}/, or convert the file (docs/faq.md)"
        ) from error
    found = {name: tensor for name, tensor in found.items() if not tensor.is_meta}
    return found or None
