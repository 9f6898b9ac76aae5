"""Export of a whole diffusers pipeline with the trained adapter merged into the network's weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from latentreward.alignment.export.lora import TrainedLoRA
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.durable import replacing
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.weights import encoder_config, no_progress_bar

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Libraries allowed in ``model_index.json``; ``stable_diffusion`` is the entry of diffusers' safety checker."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers' warnings and progress bars."""
    from diffusers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_progress_bar():
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def check_classes(base: PipelineSource) -> None:
    """Check that loading the pipeline ``base``, which a stranger's checkpoint may name, runs only libraries' code."""
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
    """Return the Python call, as text, that loads a pipeline; absent parts such as the T5 of SD3 must be passed."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    optional = getattr(diffusers, index["_class_name"])._optional_components
    absent = [name for name, entry in index.items() if entry == [None, None] and name not in optional]
    return f"DiffusionPipeline.from_pretrained({', '.join([repr(str(folder)), *(f'{name}=None' for name in absent)])})"


@quiet()
def write_merged(lora: TrainedLoRA, base: PipelineSource, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the pipeline ``base`` with its network's weights W replaced by W + alpha / rank · B A, in ``dtype``.

    The sum is computed in float32, which needs host memory for the whole pipeline in float32, and ``lora`` in it. The
    folder is written atomically; an existing one is replaced.
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
        network = getattr(pipeline, lora.family.part)
        for layer, (down, up) in lora.pairs.items():
            weight = network.get_submodule(layer).weight.data
            weight += lora.scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if dtype != torch.float32:
            pipeline.to(dtype=dtype)
        pipeline.save_pretrained(partial)
        # For some encoders (T5Gemma's) diffusers names a library that lacks the class; the base's names have loaded.
        saved = json.loads((partial / "model_index.json").read_text())
        index = {name: base.index[name] if base.has(name) else entry for name, entry in saved.items()}
        index.pop("_name_or_path", None)  # a path of this machine
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
