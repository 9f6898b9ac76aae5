"""A diffusers pipeline whose network has the trained adapter added to its weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from latentreward.backbones.loading import PipelineSource, encoder_config, no_progress_bar
from latentreward.errors import InputError, first_line
from latentreward.export.lora import TrainedLoRA
from latentreward.storage.durable import discard, replacing

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where classes of a pipeline's parts may come from; the last is diffusers' name for its safety checker."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' bars, and its remarks on text encoders that the LoRA leaves alone."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_progress_bar():
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def check_classes(base: PipelineSource) -> None:
    """Raise InputError for a pipeline with parts that are no classes of diffusers and transformers.

    The base is what a checkpoint names; diffusers runs Python files that a local pipeline brings.
    """
    import diffusers
    import transformers

    parts = {name: entry for name, entry in base.index.items() if isinstance(entry, list) and base.has(name)}
    strange = [f"{name}: {library}" for name, (library, *_) in parts.items() if library not in LIBRARIES]
    strange += map(str, Path(base.source).rglob("*.py"))
    if not hasattr(diffusers, str(base.index.get("_class_name"))) or strange:
        named = strange[0] if strange else f"_class_name: {base.index.get('_class_name')}"
        raise InputError(
            f"source={base.source!r} names {named}, which could run code; give a pipeline of diffusers' own"
        )
    for name, (_, kind) in parts.items():
        if name.startswith("text_encoder"):
            encoder_config(getattr(transformers, kind), base.source, subfolder=name, revision=base.revision)


def loading_call(folder: Path) -> str:
    """Write the Python call that loads a pipeline from ``folder``.

    Diffusers asks for ``None`` where a part is absent that it does not call optional, such as the T5 of SD3.
    """
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    optional = getattr(diffusers, index["_class_name"])._optional_components
    absent = [name for name, entry in index.items() if entry == [None, None] and name not in optional]
    return f"DiffusionPipeline.from_pretrained({', '.join([repr(str(folder)), *(f'{name}=None' for name in absent)])})"


@quiet()
def write_merged(lora: TrainedLoRA, base: PipelineSource, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the pipeline ``base`` with W + alpha / rank · B A for its network's weights W; the sum is in float32.

    Needs host memory for the whole pipeline in float32. ``folder`` gets its name when it is whole.

    Args:
        lora: In float32.
        base: The pipeline it was trained on.
        folder: Replaced if it is there.
        dtype: Of all weights that are written.

    Raises:
        InputError: If diffusers cannot load ``base`` as a whole, or would run code that it names.
    """
    from diffusers import DiffusionPipeline

    check_classes(base)
    absent = {part: None for part, entry in base.index.items() if isinstance(entry, list) and not base.has(part)}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            base.source, revision=base.revision, variant=base.variant, use_safetensors=True, **absent
        )
    except (OSError, ValueError) as error:
        raise InputError(f"source={base.source!r} cannot be loaded as a whole: {first_line(error)}") from error
    with replacing(folder) as partial:
        pipeline.load_lora_weights(file := lora.write_diffusers(partial), weight_name=file.name)
        pipeline.fuse_lora(components=[lora.part])
        pipeline.unload_lora_weights()
        discard(partial)
        if dtype != torch.float32:
            pipeline.to(dtype=dtype)
        pipeline.save_pretrained(partial)
    return folder
