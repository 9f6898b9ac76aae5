"""Weights of diffusers and transformers models: mapped from safetensors, then stored in the type that they need.

:func:`map_model` builds a model on the meta device and maps the files' tensors into it. Nothing is read yet, so that
parts of the network that nothing needs can be removed. :func:`settle` then reads what is left, tensor by tensor,
straight into its final type. A weight that needs no conversion stays mapped, and the processes of a machine share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from latentreward.core.checkpoints.base_weights import keep_sample, sample
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.json_files import read_config
from latentreward.core.storage.weight_files import find_weights, map_weights

Quantization = Literal["int8", "nf4"]
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Kind of quantisation → library that stores the weights."""
PLANNED = "planned_quantization"
"""Attribute of a layer on the meta device: kind of quantisation that it would get."""


def check_quantization(kind: str | None, tuning: str) -> None:
    """Check a setting ``quantization`` before a weight is loaded; estimates need neither a GPU nor the library."""
    if kind is None:
        return
    if tuning == "full":
        raise InputError(f"quantization={kind}: quantised weights cannot train; set tuning: lora or frozen")
    if torch.get_default_device().type == "meta":
        return
    if find_spec(LIBRARIES[kind]) is None:
        raise InputError(f"quantization={kind} needs {LIBRARIES[kind]}; pip install latentreward[quant]")
    if kind == "nf4" and not torch.cuda.is_available():
        raise InputError("quantization=nf4 (bitsandbytes) needs a GPU; use int8 (torchao) on a CPU")


def quantize(blocks: Iterable[nn.Module], kind: str) -> None:
    """Quantise the frozen linear layers of a network's blocks in place; on the meta device only note :data:`PLANNED`.

    Adapters, norms and the layers outside the blocks keep their types.
    """
    for block in blocks:
        layers = [(name, layer) for name, layer in block.named_modules() if is_frozen_linear(name, layer)]
        for name, layer in layers:
            if layer.weight.is_meta:
                setattr(layer, PLANNED, kind)
                continue
            values = sample(layer.weight.detach())
            if kind == "int8":
                from torchao.quantization import Int8WeightOnlyConfig, quantize_

                quantize_(layer, Int8WeightOnlyConfig())
            else:
                block.set_submodule(name, _to_nf4(layer))
            keep_sample(block.get_submodule(name), values)


def is_frozen_linear(name: str, layer: nn.Module) -> bool:
    """Tell whether a layer of a block is a frozen linear layer of the base."""
    return type(layer) is nn.Linear and "lora_" not in name and not layer.weight.requires_grad


def stored_bytes(layer: nn.Linear, kind: str) -> int:
    """Return the bytes that a layer's quantised weight takes, with its scales; code books are left out."""
    rows, numbers = layer.out_features, layer.weight.numel()
    if kind == "nf4":  # a scale of one byte for 64 numbers, and one of four bytes for 256 of these
        scales = ceil(numbers / 64)
        return ceil(numbers / 2) + scales + 4 * ceil(scales / 256)
    return numbers + 5 * rows  # a float32 scale and a zero point for each row


def _to_nf4(layer: Any) -> Any:
    """Return the layer as one of bitsandbytes, which quantises its weights on the way to the GPU."""
    import bitsandbytes

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    new: Any = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
    new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    new.bias = layer.bias
    return new.requires_grad_(False)


OWN_ATTENTION = (None, "eager", "sdpa")
"""Values of transformers' ``attn_implementation`` that need PyTorch alone."""
MOST_LAYERS = 100
"""Largest number of layers that a config may name; the deepest block of Stable Diffusion XL has 10, SD3 38."""
MOST_POSITIONS = {
    "max_position_embeddings": 2**20,
    "pos_embed_max_size": 1024,
    "axes_lens": 65536,
    "rope_max_seq_len": 65536,
}
"""Largest values of a config; SD3.5 has 384 positions a side, CLIP 77 tokens, OmniGen 131072, Z-Image 1536, Wan 1024.

Rotary tables may be longer, as they take little memory: a long one lets the network make larger images.
"""
REFUSED = ("missing", "unexpected", "mismatched")
"""Kinds of mismatch between a model and its files that are errors."""
SPARE = "lm_head.weight"
"""Tensor of language models that text encoders do not need; transformers leaves it out too."""
COUNTED = (".position_ids", ".num_batches_tracked")
"""Ends of the names of tensors that may be integers: of old CLIP files, and of batch norms, as FLUX.2's VAE has one."""
ALIGNMENT = 64  # bytes to which PyTorch aligns its own memory; CPU kernels round differently at other addresses
_postponed: ContextVar[list[Callable[[], None]] | None] = ContextVar("postponed", default=None)
_unread: ContextVar[dict[int, Reading] | None] = ContextVar("unread", default=None)
_undrawn: ContextVar[bool] = ContextVar("undrawn", default=False)


class Reading(NamedTuple):
    """Weight that :func:`settle` has listed."""

    tensor: Tensor  # the weight
    wanted: torch.dtype  # type in which it is to be stored


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Raise one InputError for what the libraries raise inside the block: for wrong values errors of many types."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot load {where}: {first_line(error)}") from error


def load_weights(
    family: type[Any],
    source: str,
    refused: Sequence[str] = REFUSED,
    *,
    torch_dtype: torch.dtype = torch.float32,
    **place: Any,
) -> Any:
    """Load a model in ``torch_dtype`` in evaluation mode; for the other arguments see :func:`map_model`."""
    model = map_model(family, source, refused, **place)
    settle(model, torch_dtype)
    return model


def map_model(
    family: type[Any],
    source: str,
    refused: Sequence[str] = REFUSED,
    *,
    variant: str | None = None,
    checkpoint: Path | None = None,
    **place: Any,
) -> Any:
    """Build a model whose weights are mapped from safetensors files, in their types; :func:`settle` must follow.

    Under ``torch.device("meta")`` only the config is read: the model then has shapes but no weights.

    Args:
        family: diffusers or transformers model class.
        source: Folder or hub id.
        refused: Kinds of mismatch that are errors, see :data:`REFUSED`.
        variant: File variant of the weights, such as ``fp16``.
        checkpoint: Single-file checkpoint whose weights take the place of those in ``source``, if it has this model's.
        place: ``subfolder``, ``revision`` and ``local_files_only``.
    """
    if torch.get_default_device().type == "meta":
        return from_config(family, source, None, **place).eval()
    where, of_diffusers = _where(source, place), hasattr(family, "load_config")
    config = network_config(family, source, **place) if of_diffusers else encoder_config(family, source, **place)
    stem = "diffusion_pytorch_model" if of_diffusers else "model"
    weights = None
    if checkpoint is not None:
        from latentreward.diffusion.backbones.loading import weights_of_part  # which imports this module

        weights = weights_of_part(checkpoint, family, config, source, place["subfolder"])
        where = where if weights is None else f"{place['subfolder']} of {checkpoint}"
    weights = weights or map_weights(find_weights(source, stem, variant=variant, **place))
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and not name.endswith(COUNTED):
            raise InputError(
                f"cannot load {where}: tensor {name} has type {str(tensor.dtype).removeprefix('torch.')}; get files "
                "with weights in floating point, not quantised ones"
            )
    with loading(where):
        if of_diffusers:
            model, report = _fill_network(family, config, {**weights})
        else:
            model, report = _fill_encoder(family, config, {**weights}, main_dtype(weights))
    for kind in refused:
        spare = {SPARE} if kind == "unexpected" else set()
        names = sorted(name for name in report[kind] - spare if not name.endswith(COUNTED))
        if names:
            remedy = "get the files again" if checkpoint is None else f"its configs, of {source}, are of another model"
            named = [config.get("_class_name")] if of_diffusers else config.architectures or []
            if named and named[0] and family.__name__ not in named:
                remedy = f"its config is of a {named[0]}, not a {family.__name__}; give a pipeline of the family"
            raise InputError(f"cannot load {where}: {kind} tensor {names[0]} ({len(names)} in all); {remedy}")
    if of_diffusers:
        model.register_to_config(_name_or_path=source)
    return model.eval()


def _where(source: str, place: Mapping[str, Any]) -> str:
    return f"{source}/{place['subfolder']}" if place.get("subfolder") else source


def _fill_network(
    family: type[Any], config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Any, dict[str, set[str]]]:
    """Build a diffusers model from ``tensors`` without the copies of ``from_pretrained``; name what does not fit."""
    from accelerate import init_empty_weights

    with init_empty_weights():  # parameters on the meta device; buffers get their values
        model = family.from_config(config)
    model._fix_state_dict_keys_on_load(tensors)  # old names of attention layers, as in the VAE of SD1.5
    own = model.state_dict()
    reshaped = {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    fitting = {name: tensor for name, tensor in tensors.items() if name not in reshaped}
    model.load_state_dict(fitting, strict=False, assign=True)
    return model, {
        "missing": own.keys() - tensors.keys(),
        "unexpected": tensors.keys() - own.keys(),
        "mismatched": reshaped,
    }


def _fill_encoder(
    family: type[Any], config: Any, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, dict[str, set[str]]]:
    """Build a transformers model from ``tensors``; return it with the names of missing and other tensors."""
    with no_progress_bar(), without_float32_layers(family):
        model, report = family.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported by name
            output_loading_info=True,
        )
    for name, weight in model.named_parameters():  # of files with several types, the library has rounded some
        stored = tensors.get(name, tensors.get(f"{model.base_model_prefix}.{name}"))
        if stored is not None and stored.dtype != weight.dtype and stored.shape == weight.shape:
            weight.data = stored
    kinds = ("missing", "unexpected", "mismatched")
    return model, {
        kind: {str(name[0] if isinstance(name, tuple) else name) for name in report[f"{kind}_keys"]} for kind in kinds
    }


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the floating point type that most bytes of a model's files have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


@contextmanager
def without_float32_layers(family: type[Any]) -> Iterator[None]:
    """Make transformers keep all layers in the type of the files: of T5 in float16 it would convert some to float32."""
    name = "_keep_in_fp32_modules"
    kept = {kind: vars(kind)[name] for kind in family.__mro__ if name in vars(kind)}
    for kind in kept:
        setattr(kind, name, None)
    try:
        yield
    finally:
        for kind, value in kept.items():
            setattr(kind, name, value)


def settle(
    network: nn.Module, dtype: torch.dtype, trained: torch.dtype | None = None, float32_parts: Sequence[str] = ()
) -> None:
    """Store the weights of a model in their final types, in place, reading those that are still mapped.

    A mapped weight is read from its file straight into the new type; one that has it, at an aligned address, stays
    mapped. Inside :func:`settling_later` it waits for the end of the block, inside :func:`reading_later` weights are
    listed.

    Args:
        network: Module, mapped or not.
        dtype: Floating point type of parameters that do not train.
        trained: Type of parameters that train and of buffers; None takes ``dtype``.
        float32_parts: Parts of the dotted names of parameters that are float32 whatever ``dtype`` is.
    """
    waiting = _postponed.get()
    if waiting is not None:
        waiting.append(partial(settle, network, dtype, trained, float32_parts))
        return
    unread, listed = _unread.get(), list[Reading]()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        wanted = (dtype if frozen else trained or dtype) if tensor.is_floating_point() else tensor.dtype
        if frozen and not set(float32_parts).isdisjoint(name.split(".")):
            wanted = torch.float32
        listed.append(Reading(tensor, wanted))
    if unread is None:
        read_weights(listed)
    else:
        unread |= {id(reading.tensor): reading for reading in listed}  # the last type counts


def read_weights(listed: Iterable[Reading]) -> None:
    """Store listed weights in their types, in place; see :func:`settle`."""
    for tensor, wanted in listed:
        # The address in a mapped file depends on the length of its header, and CPU kernels round differently at
        # addresses that are not aligned.
        if tensor.dtype != wanted or not (tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0):
            tensor.data = tensor.data.to(wanted, copy=True)


@contextmanager
def settling_later(undrawn: bool = False) -> Iterator[None]:
    """Postpone :func:`settle` to the end of the block: pretrained weights that are replaced inside it are never read.

    With ``undrawn`` models with initial weights stay on the meta device, and all must be replaced by :func:`assign`.
    """
    waiting: list[Callable[[], None]] = []
    tokens = _postponed.set(waiting), _undrawn.set(undrawn)
    try:
        yield
    finally:
        _postponed.reset(tokens[0])
        _undrawn.reset(tokens[1])
    for task in waiting:
        task()


def after_settling(task: Callable[[], None]) -> None:
    """Call ``task`` now, or at the end of :func:`settling_later`, once all weights before it are read."""
    waiting, unread = _postponed.get(), _unread.get()
    if waiting is not None:
        waiting.append(partial(after_settling, task))
        return
    if unread is not None:
        read_weights(unread.values())
        unread.clear()
    task()


@contextmanager
def reading_later() -> Iterator[dict[int, Reading]]:
    """List weights by their ids instead of reading them in :func:`settle`; :func:`read_weights` must follow."""
    listed: dict[int, Reading] = {}
    token = _unread.set(listed)
    try:
        yield listed
    finally:
        _unread.reset(token)


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` weights of ``module`` without a copy; tied ones, such as T5's embedding, stay tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    module.load_state_dict(tensors, strict=False, assign=True)
    for tied in (group for group in names.values() if len(group) > 1):
        taken = next((name for name in tied if name in tensors), tied[0])
        for name in tied:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, module.get_parameter(taken))


def from_config(family: type[Any], source: str, dtype: torch.dtype | None, **place: Any) -> Any:
    """Build a model with initial weights from the config in ``source``; raise InputError if its class rejects that."""
    from accelerate import init_empty_weights

    with loading(_where(source, place)), init_empty_weights() if _undrawn.get() else nullcontext():
        if hasattr(family, "load_config"):
            network = family.from_config(network_config(family, source, **place))
        else:
            network = family(encoder_config(family, source, **place))
    # Not its own `to`: diffusers' warns, whether a type changes or not.
    return network if dtype is None else nn.Module.to(network, dtype)


def network_config(family: type[Any], source: str, **place: Any) -> dict[str, Any]:
    """Read the config of a diffusers model; raise InputError for too many layers, or quantised weights."""
    where = _where(source, place)
    if (path := Path(source) / place.get("subfolder", "") / "config.json").is_file():
        check_depth(read_config(path, f"{where}: {path.name}"), where)
    with loading(where):
        config = family.load_config(source, **place)
    check_depth(config, where)
    check_unquantized(config, where)
    return config


def check_depth(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config with more layers or positions than any network has, which would take hours, or GBs."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value, where)
        elif "layers" in str(name) and any(number > MOST_LAYERS for number in numbers_in(value)):
            raise InputError(f"cannot load {where}: its config.json names more than {MOST_LAYERS} layers ({name})")
        elif name in MOST_POSITIONS and any(number > MOST_POSITIONS[name] for number in numbers_in(value)):
            raise InputError(f"cannot load {where}: its config.json has a {name} above {MOST_POSITIONS[name]}")
        elif (str(name).startswith("num_") and any(number < 0 for number in numbers_in(value))) or (
            str(name).endswith(("norm_eps", "norm_epsilon")) and type(value) not in (int, float)
        ):  # no library looks before the first pass
            raise InputError(f"cannot load {where}: its config.json has {name} = {value!r:.60}; get it as published")


def numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers in a value and in nested lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def check_unquantized(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a config of quantised weights, before files are downloaded or a library asks for its own."""
    if (stored := config.get("quantization_config")) is not None:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        named = f" of {method!r:.40}" if method is not None else ""
        raise InputError(
            f"cannot load {where}: its config.json has a quantization_config{named}; get files with weights in "
            "floating point, not quantised ones"
        )


def encoder_config(family: type[Any], source: str, **place: Any) -> Any:
    """Read the config of a transformers model, and refuse an ``attn_implementation`` whose code would be downloaded."""
    where = _where(source, place)
    with loading(where):
        config = family.config_class.from_pretrained(source, **place)
    check_depth(with_tables(config), where)
    check_unquantized(config.to_dict(), where)
    attention = config._attn_implementation
    if attention not in OWN_ATTENTION:
        raise InputError(
            f"cannot load {where}: its config.json names attn_implementation {attention!r}, whose code may be "
            "downloaded and run; remove the entry"
        )
    return config


def with_tables(config: Any) -> dict[str, Any]:
    """Return a transformers config as plain values; without the number of positions where the class has no table.

    Rotary classes name far more of them (Qwen3 40960). Qwen2.5-VL's files have entries beside ``text_config`` too.
    """
    values: dict[str, Any] = config.to_dict()
    if any(hasattr(kind, "rope_parameters") for kind in (type(config), *config.sub_configs.values())):
        values.pop("max_position_embeddings", None)
    return values | {name: with_tables(getattr(config, name)) for name in config.sub_configs}


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
