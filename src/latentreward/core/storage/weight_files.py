"""Tensors of safetensors files by memory map: nothing is read from the disk before a tensor's values are used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from torch import Tensor

from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.hub import cached_files, model_info, read_locally, silence
from latentreward.core.storage.json_files import checked, parse, read_config

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

LONGEST = 1 << 20  # bytes of the longest header that is accepted, enough for some thousand tensors

Count = Annotated[int, Interval(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Entry:
    """Entry of a tensor in a header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]  # of its first byte and the one behind its last, from the beginning of the data


def read_header(path: Path) -> tuple[dict[str, Entry], int, int]:
    """Read the header of a safetensors file; a length beyond the file or 1 MiB, of no such file, is a ValueError.

    Returns:
        The entry of each tensor by name, the byte at which the data of all tensors begin, and the file's size in bytes.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST, size - 8):
            raise ValueError("its header has no valid length")
        header: Any = parse(file.read(length))
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    return checked(dict[str, Entry], header, "its header"), 8 + length, size


def map_weights(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Map the tensors of safetensors files into memory, where they are read when they are used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            read_header(path)  # which trusts no length
            tensors |= load_file(path)
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise InputError(f"cannot load {path}: {first_line(error)}; download it again") from error
    return tensors


def find_weights(
    source: str,
    stem: str = "model",
    subfolder: str = "",
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Path, ...]:
    """Find a model's safetensors files, a single one or shards with an index, in a folder or on the hub.

    ``stem`` begins the files' names: ``model`` (transformers) or ``diffusion_pytorch_model`` (diffusers); ``variant``
    is one such as ``fp16``. ``local_files_only`` reads a hub id from the local cache alone.
    """
    suffix = f".{variant}" if variant else ""
    place = f"{subfolder}/" if subfolder else ""
    single, index = f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json"
    where = f"{source}/{subfolder}" if subfolder else source
    # Without an answer of the hub, the cache alone tells whether the weights are in one file or in shards.
    local_files_only = local_files_only or read_locally(source, revision)

    def file(name: str) -> Path | None:
        return stored_file(source, place + name, revision, local_files_only)

    if path := file(single):
        return (path,)
    if (path := file(index)) is None:
        remedy = _remedy(source, place, stem, variant, None if local_files_only else model_info(source, revision))
        raise InputError(f"cannot load {where}: no file named {single} or {index}; {remedy}")
    places = read_config(path).get("weight_map")
    named = [*places.values()] if isinstance(places, dict) else []
    if not named or not all(isinstance(name, str) and name == Path(name).name for name in named):
        raise InputError(f"cannot load {path}: its weight_map does not name files beside it; download it again")
    shards = tuple(file(name) for name in sorted({*named}))
    if None in shards:
        raise InputError(f"cannot load {where}: a shard that {index} names is missing; get the files again")
    return shards  # type: ignore[return-value]


def _remedy(source: str, place: str, stem: str, variant: str | None, told: ModelInfo | None) -> str:
    """Return what to do about weights that are not there, by the other files; ``told`` is the hub's list of them."""
    folder = (Path(source) if Path(source).is_dir() else cached_files(source) or Path(source)) / place
    listed = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if told is not None:
        found = [file.rfilename for file in told.siblings or ()]
        listed = [name.removeprefix(place) for name in found if name.startswith(place)]
    weights = [re.fullmatch(rf"{stem}(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", name) for name in listed]
    if others := sorted({found[1] or "" for found in weights if found}):
        return f"its weights are of the variant {others[0]}; set it as variant" if others[0] else "leave variant out"
    if pickles := sorted(name for name in listed if name.endswith((".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack"))):
        return (
            f"it has {pickles[0]}, but only safetensors files are read, because pickles can run code; load the model "
            "in the library that wrote it and call save_pretrained"
        )
    if place and (whole := sorted(Path(source).glob("*.safetensors"))):
        return f"if {whole[0].name} in {source} holds the whole model, give this file in place of the folder"
    return "get the files again"


def stored_file(source: str, name: str, revision: str | None, local_files_only: bool) -> Path | None:
    """Return the path of a file in a folder or on the hub, from where it is fetched; None if it is absent."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision, local_files_only=local_files_only))
    except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError
        if local_files_only:
            return None
        raise InputError(f"cannot load {source}: {silence()}, and {name} is not in the local cache") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"cannot load {source}: {first_line(error)}") from error
