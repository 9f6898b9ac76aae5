"""Export of a trained adapter: as a LoRA for diffusers, peft or kohya, or merged into a whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.alignment.policies.checkpoint import ADAPTER, SavedAdapter, network_name
from latentreward.alignment.policies.policy import POLICY, Policy
from latentreward.core.checkpoints.shards import require_finite, whole_tensor
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.durable import replacing, write_file
from latentreward.diffusion import Family, LoRA
from latentreward.diffusion.backbones.loading import PipelineSource
from latentreward.diffusion.backbones.tuning import CONFIG, PREFIX, WEIGHTS
from latentreward.diffusion.backbones.weights import encoder_config, no_progress_bar
from latentreward.diffusion.families.base import Pair

FILE = "pytorch_lora_weights.safetensors"  # file name that diffusers looks for in a folder
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # endings of the names of A and B in peft
KOHYA_FILE, KOHYA_PREFIX = "kohya_lora.safetensors", "lora_unet_"  # name of the file, and beginning of its keys


@dataclass(frozen=True)
class TrainedLoRA:
    """The weights of a trained adapter without its network, not sharded, on the CPU."""

    weights: dict[str, Tensor]  # by the names ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` in the network
    settings: LoRA  # rank, alpha, dropout and target modules
    family: Family

    def __post_init__(self) -> None:
        require_finite(self.weights, "the adapter")

    @classmethod
    def of_policy(cls, policy: Policy, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """Copy the adapter of ``policy``; if weights are sharded, all ranks must call this method."""
        weights = {
            network_name(name): whole_tensor(weight).to(dtype)
            for name, weight in policy.named_parameters()
            if ADAPTER in name
        }
        config = policy.network.peft_config[POLICY]
        settings = LoRA(config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules))
        return cls(weights, settings, policy.family)

    @classmethod
    def of_checkpoint(cls, saved: SavedAdapter, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """Take the adapter of a checkpoint; only configs of the base pipeline are read."""
        weights = {network_name(name): weight.to(dtype) for name, weight in saved.weights.items()}
        return cls(weights, saved.source.lora, saved.source.resolve_family())

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """A and B of each layer."""
        layers = [name.removesuffix(DOWN) for name in self.weights if name.endswith(DOWN)]
        return {layer: (self.weights[layer + DOWN], self.weights[layer + UP]) for layer in layers}

    @property
    def scale(self) -> float:
        """Factor of B A in a layer's weight: alpha / rank."""
        return float(self.settings.alpha) / self.settings.rank

    @property
    def scaled(self) -> dict[str, Tensor]:
        """The weights with B times :attr:`scale`, so that alpha = rank: right also for programs that read no alpha."""
        return {name: tensor * self.scale if name.endswith(UP) else tensor for name, tensor in self.weights.items()}

    def write(self, folder: Path) -> Path:
        """Write the LoRA in diffusers' format, or in PEFT's if diffusers cannot read LoRAs of the family."""
        return self.write_diffusers(folder) if self.family.lora_loader else self.write_peft(folder)

    def write_diffusers(self, folder: Path) -> Path:
        """Write :attr:`scaled` weights as :data:`FILE` into ``folder`` atomically, and return its path.

        The metadata hold only a few of peft's settings, so that other versions of peft can read the file.
        """
        from diffusers import loaders  # importing the pipeline classes takes seconds and prints warnings

        if self.family.lora_loader is None:
            raise InputError(f"format=diffusers: diffusers has no LoRA loader for {self.family.title}; use format=peft")
        used = self.settings
        targets = self.family.lora_targets if used.target_modules is None else used.target_modules
        metadata: dict[str, Any] = {"r": used.rank, "lora_alpha": used.rank, "lora_dropout": used.dropout}
        metadata |= {"target_modules": list(targets), "rank_pattern": {}, "alpha_pattern": {}}
        layers = {
            f"{self.family.part}_lora_layers": self.scaled,
            f"{self.family.part}_lora_adapter_metadata": metadata,
        }
        with replacing(folder / FILE) as partial:
            getattr(loaders, self.family.lora_loader).save_lora_weights(
                partial.parent, weight_name=partial.name, **layers
            )
            sort_metadata(partial)
        return folder / FILE

    def write_peft(self, folder: Path) -> Path:
        """Write :attr:`scaled` weights as ``PeftModel.from_pretrained(network, folder)`` reads them."""
        rank = self.settings.rank
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": self.settings.dropout}
        config |= {"target_modules": [*self.pairs], "bias": "none", "inference_mode": True}
        write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        with replacing(folder / WEIGHTS) as partial:
            save_file({PREFIX + name: tensor for name, tensor in self.scaled.items()}, partial, {"format": "pt"})
        return folder


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which are written in an order that varies, so that its bytes do not."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def write_kohya(lora: TrainedLoRA, folder: Path) -> Path:
    """Write :data:`KOHYA_FILE` into ``folder`` atomically, and return its path.

    diffusers' own ``convert_state_dict_to_kohya`` has no names for Wan.
    """
    weights: dict[str, Tensor] = {}
    named = lora.family.kohya_layers(lora.pairs)  # before the folder is made: it may have no names
    for name, (down, up) in named.items():
        key = KOHYA_PREFIX + name.replace(".", "_")
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        weights[f"{key}.alpha"] = torch.tensor(float(lora.settings.alpha), dtype=down.dtype)
    metadata = {
        "format": "pt",
        "ss_network_module": lora.family.kohya_module,
        "ss_network_dim": str(lora.settings.rank),
        "ss_network_alpha": str(lora.settings.alpha),
    }
    with replacing(folder / KOHYA_FILE) as partial:
        save_file(weights, partial, metadata)
        sort_metadata(partial)
    return folder / KOHYA_FILE


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
        raise InputError(f"source={base.source!r} names {named}, which could run code; give diffusers' own classes")
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
