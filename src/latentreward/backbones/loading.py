"""Loading the parts of a diffusers pipeline, from a folder or the hub, and applying settings to a new backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from latentreward.backbones.tuning import LoRA, StorageDtype, Tuning, store_frozen, tune
from latentreward.contracts import LatentSpace
from latentreward.errors import InputError, first_line
from latentreward.noise import NoiseProcess, process_from_scheduler
from latentreward.storage.hub import hub_answers
from latentreward.storage.json_files import read_config

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    from latentreward.backbones.base import DiffusionBackbone
    from latentreward.encoders.clip import CLIPPromptEncoder, SDXLPromptEncoder
    from latentreward.encoders.sd3 import SD3PromptEncoder
    from latentreward.encoders.vae import LatentEncoder

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o")
"""Name endings of the attention projections in CLIP and T5."""

OWN_ATTENTION = (None, "eager", "sdpa")
"""Values of transformers' ``attn_implementation`` that need PyTorch alone."""

SHIPPED = ("sd_tiny", "sd35_tiny")
"""Names of the tiny pipelines that come with the package."""
LARGEST_SAMPLE = 1024
"""Largest side, in latent pixels, of the images that a network may name as its own size."""
MOST_LAYERS = 100
"""Largest number of layers that a config may name; the deepest block of Stable Diffusion XL has 10, SD3 38."""

Backbone = TypeVar("Backbone", bound="DiffusionBackbone")


def tiny_pipeline(name: str) -> str:
    """Return the folder of a shipped tiny pipeline, one of :data:`SHIPPED`."""
    return str(files("latentreward.tinyworld") / "pipelines" / name)


class PipelineSource:
    """A diffusers pipeline in a folder or on the hub, whose parts are loaded one at a time.

    Weights are read from safetensors files only, never from pickles. Under ``torch.device("meta")`` only configs are
    read: the parts then have shapes but no weights, and no weights are downloaded.

    A folder that has ``unet/`` or ``transformer/`` but no ``model_index.json`` counts as a pipeline without encoders.

    Args:
        source: Folder, hub id, or name of a shipped pipeline (:data:`SHIPPED`).
        revision: Branch, tag or commit of a hub id.
        variant: File variant of the weights, such as ``fp16``.

    Raises:
        InputError: If ``source`` looks like a path but does not exist, or is not a diffusers pipeline.
    """

    def __init__(self, source: str, revision: str | None = None, variant: str | None = None) -> None:
        self.source = tiny_pipeline(source) if source in SHIPPED else str(source)
        self.revision, self.variant = revision, variant
        self._offline: bool | None = None
        folder = Path(self.source)
        looks_local = folder.is_absolute() or self.source.startswith((".", "~")) or self.source.count("/") > 1
        if not folder.exists() and looks_local:
            raise InputError(f"source={self.source!r} does not exist; give a diffusers pipeline folder or a hub id")
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            self.index = {part: ["diffusers", ""] for part in ("unet", "transformer") if (folder / part).is_dir()}
            if not self.index:
                raise InputError(
                    f"source={self.source!r} is not a diffusers pipeline: it has neither model_index.json nor unet/ "
                    "nor transformer/; give the folder that holds them"
                )
            self.index["scheduler"] = ["diffusers", ""]
        else:
            self.index = self._json("model_index.json")

    def __str__(self) -> str:
        """Return ``source`` or ``source@revision``."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    def _file(self, name: str) -> Path:
        if Path(self.source).exists():
            return Path(self.source) / name
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            if self._offline is None:
                self._offline = not hub_answers(self.source, name, self.revision)
            return Path(hf_hub_download(self.source, name, revision=self.revision, local_files_only=self._offline))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = "the hub does not answer" if self._offline else type(error).__name__
            raise InputError(
                f"source={self.source!r} is not a local folder and cannot be fetched from the hub ({reason}); check "
                "the name, the network and your access, or give a local folder"
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        if not path.is_file():
            raise InputError(f"source={self.source!r} lacks {name}; download the whole pipeline again")
        return read_config(path, f"source={self.source!r}: {name}")

    def config(self, part: str) -> dict[str, Any]:
        """Read the config of ``part``, such as ``unet``, ``vae`` or ``scheduler``.

        Raises:
            InputError: If the pipeline does not have ``part``, or the file is missing or damaged.
        """
        self._require(part)
        return self._json(f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json")

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has ``part``."""
        return bool(self.index.get(part) and self.index[part][0])

    def _require(self, part: str) -> None:
        if not self.has(part):
            parts = sorted(name for name in self.index if self.has(name) and not name.startswith("_"))
            raise InputError(
                f"source={self.source!r} is a {self.index.get('_class_name', 'pipeline')} without a {part} "
                f"(it has {', '.join(parts)}); choose a backbone that fits it"
            )

    def _load(self, family: type[Any], part: str, pretrained: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        self._require(part)
        place = {"subfolder": part, "revision": self.revision}
        if pretrained:
            return load_weights(family, self.source, variant=self.variant, torch_dtype=dtype, **place)
        return from_config(family, self.source, dtype, **place)

    def unet(self, pretrained: bool = True) -> UNet2DConditionModel:
        """Load the U-Net in float32; with ``pretrained=False`` it has initial weights."""
        from diffusers import UNet2DConditionModel

        return self._load(UNet2DConditionModel, "unet", pretrained)

    def transformer(self, pretrained: bool = True) -> SD3Transformer2DModel:
        """Load the SD3 transformer in float32; with ``pretrained=False`` it has initial weights."""
        from diffusers import SD3Transformer2DModel

        return self._load(SD3Transformer2DModel, "transformer", pretrained)

    def noise_process(self) -> NoiseProcess:
        """Return the forward noise process that the pipeline's scheduler config describes."""
        return process_from_scheduler(self.config("scheduler"))

    def latent_space(self) -> LatentSpace:
        """Return the latent space that the VAE's config describes."""
        from latentreward.encoders.vae import latent_space_of

        return latent_space_of(self.config("vae"))

    def latent_encoder(self, dtype: StorageDtype = "float32") -> LatentEncoder:
        """Load the VAE in ``dtype``."""
        from diffusers import AutoencoderKL

        from latentreward.encoders.vae import LatentEncoder

        return LatentEncoder(self._load(AutoencoderKL, "vae", dtype=getattr(torch, dtype)))

    def tokenizer(self, part: str) -> Any:
        """Load the tokenizer ``part``, such as ``tokenizer_2``.

        Raises:
            InputError: If the pipeline does not have ``part``, or the vocabulary does not fit the text encoder.
        """
        from transformers import CLIPTokenizer, T5TokenizerFast

        self._require(part)
        family = T5TokenizerFast if self.index[part][1].startswith("T5") else CLIPTokenizer
        try:
            tokenizer = family.from_pretrained(self.source, subfolder=part, revision=self.revision)
        except (OSError, ValueError) as error:
            raise InputError(f"source={self.source!r}: cannot load {part}: {first_line(error)}") from error
        rows = self.config(part.replace("tokenizer", "text_encoder"))["vocab_size"]
        check_tokenizer(tokenizer, rows, f"source={self.source!r}: {part}", f"download {part} again")
        return tokenizer

    def clip_prompts(self, pretrained: bool = True) -> CLIPPromptEncoder:
        """Load the prompt encoder of SD1.5 or SD2.1."""
        from transformers import CLIPTextModel

        from latentreward.encoders.clip import CLIPPromptEncoder

        return CLIPPromptEncoder(self._load(CLIPTextModel, "text_encoder", pretrained), self.tokenizer("tokenizer"))

    def sdxl_prompts(self, pretrained: bool = True) -> SDXLPromptEncoder:
        """Load the prompt encoder of SDXL."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from latentreward.encoders.clip import SDXLPromptEncoder

        return SDXLPromptEncoder(
            self._load(CLIPTextModel, "text_encoder", pretrained),
            self._load(CLIPTextModelWithProjection, "text_encoder_2", pretrained),
            self.tokenizer("tokenizer"),
            self.tokenizer("tokenizer_2"),
        )

    def sd3_prompts(self, token_dim: int, t5_length: int, load_t5: bool = True) -> SD3PromptEncoder:
        """Load the prompt encoder of SD3 or SD3.5, without T5 if the pipeline has none or ``load_t5`` is False.

        Args:
            token_dim: Width of the token embeddings that the transformer takes.
            t5_length: Number of T5 tokens per prompt; without T5 the number of zero tokens in their place.
            load_t5: Whether to load T5 if the pipeline has it.
        """
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        from latentreward.encoders.sd3 import SD3PromptEncoder

        with_t5 = load_t5 and self.has("text_encoder_3")
        return SD3PromptEncoder(
            self._load(CLIPTextModelWithProjection, "text_encoder"),
            self._load(CLIPTextModelWithProjection, "text_encoder_2"),
            self._load(T5EncoderModel, "text_encoder_3") if with_t5 else None,
            self.tokenizer("tokenizer"),
            self.tokenizer("tokenizer_2"),
            self.tokenizer("tokenizer_3") if with_t5 else None,
            token_dim=token_dim,
            t5_length=t5_length,
        )


def load_weights(
    family: type[Any], source: str, refused: Sequence[str] = ("missing", "unexpected", "mismatched"), **options: Any
) -> Any:
    """Call ``family.from_pretrained`` and check that the files' tensors match those of the model.

    Weights are read from safetensors, by default in float32. Under ``torch.device("meta")`` only the config is read:
    the model then has shapes but no weights.

    Args:
        family: diffusers or transformers model class.
        source: Folder or hub id.
        refused: Kinds of mismatch that are errors: tensors ``missing`` in the files, ``unexpected`` ones in the files,
            and ``mismatched`` shapes.
        options: Further arguments of ``from_pretrained``.

    Raises:
        InputError: If the files cannot be read, or have a mismatch of a kind in ``refused``.
    """
    where = f"{source}/{options['subfolder']}" if options.get("subfolder") else source
    if options.get("variant") is None:
        options.pop("variant", None)
    place = {name: options[name] for name in ("subfolder", "revision", "local_files_only") if name in options}
    if torch.get_default_device().type == "meta":
        return from_config(family, source, options.get("torch_dtype", options.get("dtype")), **place).eval()
    if not hasattr(family, "load_config"):  # so that transformers, like diffusers, reports mismatched shapes by name
        options |= {"ignore_mismatched_sizes": True, "config": encoder_config(family, source, **place)}
    elif (path := Path(source) / options.get("subfolder", "") / "config.json").is_file():
        check_depth(read_config(path, f"{where}: {path.name}"), where)
    try:
        with no_progress_bar():
            model, report = family.from_pretrained(
                source, **{"torch_dtype": torch.float32, **options}, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # for wrong values in a config the libraries raise errors of many types
        raise InputError(f"cannot load {where}: {first_line(error)}") from error
    for kind in refused:
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[f"{kind}_keys"])
        names = [name for name in names if not name.endswith(".position_ids")]  # a constant that old CLIP files hold
        if names:
            raise InputError(
                f"cannot load {where}: {kind} tensor {names[0]} ({len(names)} in all); get the files again"
            )
    for tensor in (*model.parameters(), *model.buffers()):
        # The address in a memory-mapped file depends on the length of its header, and CPU kernels round differently at
        # addresses that are not aligned.
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def from_config(family: type[Any], source: str, dtype: torch.dtype | str | None, **place: Any) -> Any:
    """Build a model with initial weights from the config in ``source``.

    Args:
        family: diffusers or transformers model class.
        source: Folder or hub id.
        dtype: Type of the weights; None or a text leaves float32.
        place: ``subfolder``, ``revision`` and ``local_files_only``.

    Raises:
        InputError: If the config cannot be read, or the class rejects it.
    """
    where = f"{source}/{place['subfolder']}" if place.get("subfolder") else source
    try:
        if hasattr(family, "load_config"):
            check_depth(config := family.load_config(source, **place), where)
            network = family.from_config(config)
        else:
            network = family(encoder_config(family, source, **place))
    except InputError:
        raise
    except Exception as error:  # for wrong values the libraries raise errors of many types
        raise InputError(f"cannot load {where}: {first_line(error)}") from error
    # Not its own `to`: diffusers' warns, whether a type changes or not.
    return nn.Module.to(network, dtype) if isinstance(dtype, torch.dtype) else network


def check_depth(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that names more layers than any network has; making them would take hours.

    Args:
        config: Config of a network; entries whose names contain ``layers`` are numbers of layers or lists of them.
        where: Place of the config, for the message.

    Raises:
        InputError: If a number of layers is above :data:`MOST_LAYERS`.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value, where)
        elif "layers" in str(name) and any(number > MOST_LAYERS for number in numbers_in(value)):
            raise InputError(f"cannot load {where}: its config.json names more than {MOST_LAYERS} layers ({name})")


def check_sample_size(size: Any) -> None:
    """Refuse a ``sample_size`` of a network, to which images are resized, that would fill any machine's memory.

    Args:
        size: Side in latent pixels, or height and width.

    Raises:
        InputError: If a side is not a whole number from 1 to :data:`LARGEST_SAMPLE`.
    """
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SAMPLE for side in sides):
        raise InputError(f"the network's sample_size is {size!r}, not a size from 1 to {LARGEST_SAMPLE}")


def numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers in a value and in nested lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def check_tokenizer(tokenizer: Any, rows: int, name: str, remedy: str) -> None:
    """Raise InputError if the tokenizer's vocabulary does not fit a text encoder with ``rows`` token embeddings.

    Args:
        tokenizer: Tokenizer of transformers.
        rows: Rows of the text encoder's embedding table.
        name: Name of the tokenizer, with which the message begins.
        remedy: End of the message.
    """
    if not rows // 2 <= len(tokenizer) <= rows:  # transformers 5 returns an empty tokenizer if its files are missing
        raise InputError(f"{name} has {len(tokenizer)} tokens, but its text encoder has {rows}; {remedy}")


def encoder_config(family: type[Any], source: str, **place: Any) -> Any:
    """Read the config of a transformers model, and refuse an ``attn_implementation`` whose code would be downloaded.

    Args:
        family: transformers model class.
        source: Folder or hub id.
        place: ``subfolder``, ``revision`` and ``local_files_only``.

    Raises:
        InputError: If the config cannot be read, or names an attention that is not in :data:`OWN_ATTENTION`.
    """
    where = f"{source}/{place['subfolder']}" if place.get("subfolder") else source
    try:
        config = family.config_class.from_pretrained(source, **place)
    except Exception as error:  # for wrong values the library raises errors of many types
        raise InputError(f"cannot load {where}: {first_line(error)}") from error
    check_depth(config.to_dict(), where)
    attention = config._attn_implementation
    if attention not in OWN_ATTENTION:
        raise InputError(
            f"cannot load {where}: its config.json names attn_implementation {attention!r}, whose code may be "
            "downloaded and run; remove the entry"
        )
    return config


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Switch off transformers' loading bar inside the block: it fills two lines of a log for milliseconds of work."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_channels(source: str, network: str, config: Mapping[str, Any], space: LatentSpace) -> None:
    """Raise InputError if a network's number of input channels differs from that of its pipeline's latents.

    Args:
        source: Pipeline, for the message.
        network: Name of the network, for the message.
        config: Config of the network.
        space: Latent space of the pipeline's VAE.
    """
    if config["in_channels"] != space.channels:
        raise InputError(
            f"source={source!r}: the {network} takes {config['in_channels']} channels, but the VAE makes latents of "
            f"[{space}]; give a text-to-image pipeline whose parts belong together"
        )


def finish(
    backbone: Backbone,
    network: nn.Module,
    unread: tuple[str, ...] = (),
    tuning: Tuning = "lora",
    lora: LoRA | None = None,
    text_encoder_tuning: Tuning = "frozen",
    frozen_dtype: StorageDtype = "float32",
    **execution: Any,
) -> Backbone:
    """Apply the settings that all factories share to a newly built backbone, and return the backbone.

    Args:
        backbone: New backbone.
        network: diffusers network of the backbone.
        unread: Names of the network's modules that no tap depends on.
        tuning: Weights of the network that train: ``full`` (all), ``lora`` (adapters) or ``frozen`` (none).
        lora: Adapter settings for ``tuning: lora``; the default is DiNa-LRM's rank 64, alpha 128.
        text_encoder_tuning: Weights of the text encoders that train: ``full``, ``lora`` or ``frozen``.
        frozen_dtype: Type in which frozen weights are stored; use ``bfloat16`` with ``precision: bf16-mixed``.
        execution: See :func:`set_execution`.

    Raises:
        InputError: If ``lora`` is set but neither tuning is ``lora``, or the attention backend cannot be used.
    """
    if lora is not None and "lora" not in (tuning, text_encoder_tuning):
        raise InputError(f"lora is set, but tuning is {tuning!r}; set tuning: lora or leave lora out")
    lora = lora or LoRA()
    tune(network, tuning, lora, unread)
    network.train(tuning != "frozen")
    if backbone.text_encoder is not None:
        text_lora = LoRA(lora.rank, lora.alpha, lora.dropout, TEXT_ATTENTION)
        tune(backbone.text_encoder, text_encoder_tuning, text_lora, backbone.text_encoder.unread)
        backbone.text_encoder.train(text_encoder_tuning != "frozen")
    if tuning != "full":  # with "full" only unread modules are frozen, and all stay float32
        store_frozen(network, frozen_dtype)
    if text_encoder_tuning != "full" and backbone.text_encoder is not None:
        store_frozen(backbone.text_encoder, frozen_dtype)
    set_execution(backbone.blocks(), network, **execution)
    return backbone


def set_execution(
    blocks: Iterable[nn.Module],
    network: nn.Module,
    gradient_checkpointing: bool = False,
    attention_backend: str | None = None,
    compile_blocks: bool = False,
) -> None:
    """Set gradient checkpointing, attention kernels and compilation of a network.

    Args:
        blocks: Blocks to compile, each by itself.
        network: diffusers network with these blocks.
        gradient_checkpointing: Recompute block activations in the backward pass: less memory, about a third slower.
        attention_backend: Name of a diffusers attention backend, such as ``flash``; None keeps PyTorch's own.
        compile_blocks: Compile each block with ``torch.compile``.

    Raises:
        InputError: If the attention backend is unknown or its library is missing.
    """
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if attention_backend is not None:
        try:
            network.set_attention_backend(attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"attention_backend={attention_backend!r}: {first_line(error)}") from error
    if compile_blocks:
        for block in blocks:
            block.compile(dynamic=False)  # Inductor (torch 2.13, CPU) fails on a U-Net with dynamic shapes
