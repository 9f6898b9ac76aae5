"""Loading the parts of a diffusers pipeline, from a folder or the hub, and applying settings to a new backbone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from latentreward.core.contracts import LatentSpace, PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.registry import of_this_package
from latentreward.core.storage.hub import hub_answers, not_found, silence
from latentreward.core.storage.json_files import entry, read_config
from latentreward.core.storage.weight_files import find_weights, map_weights
from latentreward.diffusion.backbones.tuning import LoRA, StorageDtype, Tuning, tune, warn_of_layers
from latentreward.diffusion.backbones.weights import (
    Quantization,
    after_settling,
    check_quantization,
    from_config,
    load_weights,
    map_model,
    quantize,
    settle,
)
from latentreward.diffusion.noise.processes import DDPM, FlowMatching, process_from_scheduler
from latentreward.diffusion.noise.schedules import DDPM_SCHEDULERS, FLOW_SCHEDULERS, fits_kind

if TYPE_CHECKING:
    from latentreward.diffusion.backbones.base import DiffusionBackbone
    from latentreward.diffusion.encoders.prompts import CLIPPromptEncoder, SD3PromptEncoder, SDXLPromptEncoder
    from latentreward.diffusion.encoders.vae import LatentEncoder
    from latentreward.diffusion.noise.processes import NoiseProcess

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "q", "k", "v", "o")
"""Name endings of the attention projections in CLIP, language models and T5."""

TOKENIZERS = {"CLIP": "CLIPTokenizer", "T5": "T5TokenizerFast", "Qwen2": "Qwen2Tokenizer", "Gemma": "GemmaTokenizer"}
"""Beginning of the name of a tokenizer's class, in any version of transformers → class that it is loaded as."""
SHIPPED = ("sd_tiny", "sd35_tiny")
"""Names of the tiny pipelines that come with the package."""
PART = re.compile(r"(unet|transformer|vae|scheduler|text_encoder|tokenizer)(_\d+)?")
"""Names of the parts of a pipeline that are loaded."""
LARGEST_SAMPLE = 1024
"""Largest side, in latent pixels, of the images that a network may name as its own size."""

ANOTHER_PROCESS = ("v_pred", "ztsnr", "edm_vpred.sigma_max")
"""Tensors by which checkpoints of SDXL say that their noise process is not SDXL's, as ComfyUI's ``supported_models.py``
reads them: NoobAI's v prediction, its levels up to pure noise, CosXL."""
Backbone = TypeVar("Backbone", bound="DiffusionBackbone")


def tiny_pipeline(name: str) -> str:
    """Return the folder of a shipped tiny pipeline, one of :data:`SHIPPED`."""
    return str(files("latentreward.tinyworld") / "pipelines" / name)


class PipelineSource:
    """A diffusers pipeline in a folder or on the hub, whose parts are loaded one at a time.

    Weights are read from safetensors files only, never from pickles. Under ``torch.device("meta")`` only configs are
    read: the parts then have shapes but no weights, and no weights are downloaded.

    A folder that has ``unet/`` or ``transformer/`` but no ``model_index.json`` counts as a pipeline without encoders. A
    single-file checkpoint, whose names diffusers converts, is read with the configs and tokenizers of a folder of the
    file's name beside it, or of the hub.

    Args:
        source: Folder, hub id, safetensors file, or name of a shipped pipeline (:data:`SHIPPED`).
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.

    Attributes:
        configs: Folder or hub id with configs and tokenizers; ``source`` but for a file.
    """

    def __init__(self, source: PathText, revision: str | None = None, variant: str | None = None) -> None:
        self.named, self.source = str(source), tiny_pipeline(source) if source in SHIPPED else str(source)
        self.revision, self.variant = revision, variant
        self._offline: bool | None = None
        self._read = dict[str, dict[str, Any]]()  # a rollout asks for entries; the hub would be asked each time
        folder = Path(self.source)
        looks_local = folder.is_absolute() or self.source.startswith((".", "~")) or self.source.count("/") > 1
        if not folder.exists() and looks_local:
            raise InputError(f"source={self.source!r} does not exist; give a diffusers pipeline folder or a hub id")
        self.checkpoint = folder if folder.is_file() else None
        self.configs = self.source
        if self.checkpoint is not None:
            self.configs = find_configs(self.checkpoint)
            if revision or variant:
                raise InputError(f"source={self.source!r} is a file, which has no revision or variant; leave them out")
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            self.index = {part: ["diffusers", ""] for part in ("unet", "transformer") if (folder / part).is_dir()}
            if not self.index:
                single = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:3])
                raise InputError(
                    f"source={self.source!r} is not a diffusers pipeline: it has neither model_index.json nor unet/ "
                    f"nor transformer/; give the folder that holds them, or the file of a whole model ({single or '-'})"
                )
            self.index["scheduler"] = ["diffusers", ""]
            return
        self.index = self._json("model_index.json")
        for name, value in self.index.items():
            if PART.fullmatch(name) and value is not None and not _names_class(value):
                raise InputError(
                    f"source={self.source!r}: model_index.json has {name}={value!r:.80}, which must be null or the "
                    "names of a library and a class; get the pipeline as published"
                )

    def __str__(self) -> str:
        """Return ``source`` or ``source@revision``."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    def _file(self, name: str) -> Path:
        if Path(self.configs).exists():
            return Path(self.configs) / name
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            if self._offline is None:
                self._offline = not hub_answers(self.configs, name, self.revision)
            return Path(hf_hub_download(self.configs, name, revision=self.revision, local_files_only=self._offline))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = silence() if self._offline else type(error).__name__
            if self.checkpoint is not None:
                raise InputError(
                    f"source={self.source!r} is a file without configs, and those of {self.configs} cannot be fetched "
                    f"from the hub ({reason}); once you have access, run `hf download {self.configs} --include "
                    f"'*.json' '*.txt' '*.model' --local-dir {self.checkpoint.with_suffix('')}`"
                ) from error
            raise InputError(
                f"source={self.source!r} {not_found(self.source, reason)}, or give a local folder; for the base of a "
                "published model give your copy as --base FOLDER"
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            path = self._file(name)
            if not path.is_file():
                raise InputError(f"source={self.source!r} lacks {name}; download the whole pipeline again")
            self._read[name] = read_config(path, f"source={self.source!r}: {name}")
        return deepcopy(self._read[name])

    def config(self, part: str) -> dict[str, Any]:
        """Read the config of ``part``, such as ``unet``, ``vae`` or ``scheduler``."""
        self._require(part)
        return self._json(f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json")

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has ``part``."""
        named: Any = self.index.get(part)  # other entries of model_index.json are values of any kind
        return _names_class(named) and bool(named[0])

    def _require(self, part: str) -> None:
        if not self.has(part):
            parts = sorted(name for name in self.index if self.has(name) and not name.startswith("_"))
            raise InputError(
                f"source={self.source!r} is a {self.index.get('_class_name', 'folder without model_index.json')}, "
                f"without a {part} (it has {', '.join(parts)}); choose a backbone that fits it, or download all of it"
            )

    def load(self, kind: type[Any], part: str, pretrained: bool = True, mapped: bool = True) -> Any:
        """Load ``part`` as the class ``kind`` of diffusers or transformers, with initial weights unless ``pretrained``.

        ``mapped`` weights stay unread in the files' type for ``weights.settle``; others are float32.
        """
        self._require(part)
        place: dict[str, Any] = {"subfolder": part, "revision": self.revision}
        if not pretrained:
            return from_config(kind, self.configs, torch.float32, **place)
        place |= {"variant": self.variant, "checkpoint": self.checkpoint}
        return (map_model if mapped else load_weights)(kind, self.configs, **place)

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        """Read single weights of ``part``."""
        self._require(part)
        place = {"subfolder": part, "revision": self.revision, "variant": self.variant}
        weights = map_weights(find_weights(self.configs, "diffusion_pytorch_model", **place))
        found = [weights[name].clone() if name in weights else None for name in names]
        for name, tensor in zip(names, found, strict=True):
            if tensor is None:
                raise InputError(f"source={self.source!r}: {part} has no weight {name}; download {part} again")
        return [tensor for tensor in found if tensor is not None]

    def noise_process(self) -> NoiseProcess:
        """Return the forward noise process that the pipeline's scheduler config describes, if it fits the network."""
        config = self.config("scheduler")
        if self.has("unet"):
            return process_from_scheduler(config, DDPM_SCHEDULERS)
        kind = self.config("transformer").get("_class_name") if self.has("transformer") else None
        taken = FLOW_SCHEDULERS if kind == "SD3Transformer2DModel" else (*FLOW_SCHEDULERS, *DDPM_SCHEDULERS)
        return process_from_scheduler(config, taken)

    def latent_space(self) -> LatentSpace:
        """Return the latent space that the VAE's config describes."""
        from latentreward.diffusion.encoders.vae import LatentEncoder

        return LatentEncoder.space_of(self.config("vae"), f"source={self.source!r}: vae")

    def latent_encoder(self, dtype: StorageDtype = "float32") -> LatentEncoder:
        """Load the VAE in ``dtype``."""
        from diffusers import AutoencoderKL

        from latentreward.diffusion.encoders.vae import LatentEncoder

        vae = self.load(AutoencoderKL, "vae")
        settle(vae, getattr(torch, dtype))
        return LatentEncoder(vae)

    def tokenizer(self, part: str, kind: type[Any] | None = None) -> Any:
        """Load the tokenizer ``part``, as ``kind`` or as the class of transformers that ``model_index.json`` names."""
        import transformers

        self._require(part)
        named = self.index[part][1] or ""
        usual = next((one for start, one in TOKENIZERS.items() if named.startswith(start)), named)
        family: Any = kind or getattr(transformers, usual, None)
        own = isinstance(family, type) and issubclass(family, transformers.PreTrainedTokenizerBase)
        if not own:
            raise InputError(
                f"source={self.source!r}: {part} is a {named!r} in model_index.json, which is no tokenizer of "
                "transformers; save it as one of transformers' own"
            )
        try:
            tokenizer = family.from_pretrained(self.configs, subfolder=part, revision=self.revision)
        except Exception as error:  # files that do not fit the class end in errors of any kind
            raise InputError(f"source={self.source!r}: cannot load {part}: {first_line(error)}") from error
        encoder = part.replace("tokenizer", "text_encoder")
        if not self.has(encoder):  # a network that embeds tokens itself, as OmniGen's does
            return tokenizer
        config = self.config(encoder)
        nested = config.get("text_config")
        config = {**config, **nested} if isinstance(nested, dict) else config
        rows = entry(config, "vocab_size", int, f"source={self.source!r}: {encoder}")
        remedy = f"download {part} again, or take {part} and {encoder} from one pipeline"
        check_tokenizer(tokenizer, rows, f"source={self.source!r}: {part}", remedy)
        return tokenizer

    def image_processor(self, part: str, kind: type[Any]) -> Any:
        """Create the image processor of class ``kind`` in transformers with the settings of ``part``."""
        self._require(part)
        name = f"{part}/preprocessor_config.json"
        try:
            return kind.from_dict(self._json(name))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"source={self.source!r}: {name} does not fit {kind.__name__} ({first_line(error)}); download {part} "
                "again"
            ) from error

    def clip_prompts(self, pretrained: bool = True, mapped: bool = False) -> CLIPPromptEncoder:
        """Load the prompt encoder of SD1.5 or SD2.1; for the arguments see :meth:`load`."""
        from transformers import CLIPTextModel

        from latentreward.diffusion.encoders.prompts import CLIPPromptEncoder

        text_encoder = self.load(CLIPTextModel, "text_encoder", pretrained, mapped)
        return CLIPPromptEncoder(text_encoder, self.tokenizer("tokenizer"))

    def sdxl_prompts(self, pretrained: bool = True, mapped: bool = False) -> SDXLPromptEncoder:
        """Load the prompt encoder of SDXL; for the arguments see :meth:`load`."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from latentreward.diffusion.encoders.prompts import SDXLPromptEncoder

        return SDXLPromptEncoder(
            self.load(CLIPTextModel, "text_encoder", pretrained, mapped),
            self.load(CLIPTextModelWithProjection, "text_encoder_2", pretrained, mapped),
            self.tokenizer("tokenizer"),
            self.tokenizer("tokenizer_2"),
        )

    def sd3_prompts(
        self, token_dim: int, t5_length: int, load_t5: bool = True, mapped: bool = False
    ) -> SD3PromptEncoder:
        """Load the prompt encoder of SD3 or SD3.5, without T5 if the pipeline has none or ``load_t5`` is False.

        For the other arguments see :class:`SD3PromptEncoder` and :meth:`load`.
        """
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        from latentreward.diffusion.encoders.prompts import SD3PromptEncoder

        with_t5 = load_t5 and self.has("text_encoder_3")
        return SD3PromptEncoder(
            self.load(CLIPTextModelWithProjection, "text_encoder", mapped=mapped),
            self.load(CLIPTextModelWithProjection, "text_encoder_2", mapped=mapped),
            self.load(T5EncoderModel, "text_encoder_3", mapped=mapped) if with_t5 else None,
            self.tokenizer("tokenizer"),
            self.tokenizer("tokenizer_2"),
            self.tokenizer("tokenizer_3") if with_t5 else None,
            token_dim=token_dim,
            t5_length=t5_length,
        )


def _names_class(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str | None) for one in value)


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


def check_process(backbone: DiffusionBackbone) -> None:
    """Refuse a user's backbone that is a flow beside a scheduler of DDPM in its network's pipeline, or the reverse."""
    process, own = backbone.noise_process, backbone.built_by
    if not isinstance(process, FlowMatching | DDPM) or (own is not None and of_this_package(own.class_path)):
        return
    for network in backbone.children():
        source, config = getattr(getattr(network, "config", None), "_name_or_path", None), {}
        with suppress(InputError):  # no pipeline, or one without a scheduler
            config = PipelineSource(source).config("scheduler") if source else {}
        if not fits_kind(config, isinstance(process, FlowMatching)):
            raise InputError(
                f"backbone: {type(backbone).__name__} adds noise as {type(process).__name__}, but its "
                f"{type(network).__name__} is of source={source!r} with a {config.get('_class_name')}; give it "
                "PipelineSource(source).noise_process()"
            )


def check_sample_size(size: Any) -> tuple[int, int]:
    """Check a network's ``sample_size``, to which images are resized; return its height and width in latent pixels."""
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SAMPLE for side in sides):
        raise InputError(f"the network's sample_size is {size!r}, not a size from 1 to {LARGEST_SAMPLE}")
    return sides[0], sides[1]


def check_tokenizer(tokenizer: Any, rows: int, name: str, remedy: str) -> None:
    """Raise InputError if the tokenizer's vocabulary does not fit a text encoder with ``rows`` token embeddings."""
    if not rows // 2 <= len(tokenizer) <= rows:  # transformers 5 returns an empty tokenizer if its files are missing
        raise InputError(f"{name} has {len(tokenizer)} tokens, but its text encoder has {rows}; {remedy}")


def check_channels(
    source: str, network: str, config: Mapping[str, Any], space: LatentSpace, positions: int = 1
) -> None:
    """Refuse a network whose tokens join other channels than those of ``positions`` of its pipeline's latents."""
    taken = entry(config, "in_channels", int, f"source={source!r}: {network}")
    if taken != positions * space.channels:
        joined = f" ({positions} positions to a token)" if positions > 1 else ""
        raise InputError(
            f"source={source!r}: the {network} takes {taken} channels, but the VAE makes latents of [{space}]{joined}; "
            "give a text-to-image pipeline whose parts belong together, or set positions in a family of your own"
        )


def finish(
    backbone: Backbone,
    network: nn.Module,
    unread: tuple[str, ...] = (),
    tuning: Tuning = "lora",
    lora: LoRA | None = None,
    text_encoder_tuning: Tuning = "frozen",
    frozen_dtype: StorageDtype = "float32",
    float32_parts: Sequence[str] = (),
    **execution: Any,
) -> Backbone:
    """Apply the settings of :class:`~latentreward.diffusion.families.backbone.BackboneOptions` to a new backbone.

    ``unread`` are names of the network's modules that no tap depends on, ``float32_parts`` those of its family.
    """
    if lora is not None and "lora" not in (tuning, text_encoder_tuning):
        raise InputError(f"lora is set, but tuning is {tuning!r}; set tuning: lora or lora: null")
    check_quantization(execution.get("quantization"), tuning)
    lora = lora or LoRA()
    targets = backbone.lora_targets if lora.target_modules is None else lora.target_modules
    if tuning == "lora":
        warn_of_layers(network, lora, getattr(backbone, "family", backbone))
    tune(network, tuning, replace(lora, target_modules=targets), unread)
    network.train(tuning != "frozen")
    if backbone.text_encoder is not None:
        text_lora = replace(lora, target_modules=TEXT_ATTENTION)
        tune(backbone.text_encoder, text_encoder_tuning, text_lora, backbone.text_encoder.unread)
        backbone.text_encoder.train(text_encoder_tuning != "frozen")
    for module, kind, parts in ((network, tuning, float32_parts), (backbone.text_encoder, text_encoder_tuning, ())):
        if module is not None:  # with "full" only unread modules are frozen, and all stay float32
            settle(module, torch.float32 if kind == "full" else getattr(torch, frozen_dtype), torch.float32, parts)
    set_execution(backbone.blocks(), network, **execution)
    return backbone


def set_execution(
    blocks: Iterable[nn.Module],
    network: nn.Module,
    gradient_checkpointing: bool = False,
    attention_backend: str | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Set gradient checkpointing, attention kernels and quantisation of a network and its ``blocks``."""
    if gradient_checkpointing:
        try:
            network.enable_gradient_checkpointing()
        except ValueError as error:  # of diffusers, which tells its developers what to do
            kind = type(network).__name__
            raise InputError(f"gradient_checkpointing=True: {kind} does not support it; leave it out") from error
    if attention_backend is not None:
        set_attention_backend(network, attention_backend)
    if quantization is not None:
        after_settling(partial(quantize, list(blocks), quantization))


def set_attention_backend(network: nn.Module, name: str) -> None:
    """Let a network compute its attention with another of diffusers' backends; other networks keep theirs."""
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend():  # restores the process's default, which diffusers changes too
            network.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"attention_backend={name!r}: {first_line(error)}") from error
    processors = (getattr(module, "processor", None) for module in network.modules())
    if name != "native" and not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise InputError(
            f"attention_backend={name!r}: {type(network).__name__} calls PyTorch's attention itself, which picks the "
            "fastest of PyTorch's kernels; remove attention_backend"
        )
