"""Reader of PyTorch's shards that runs no code; a file of its own because its imports take a second."""

# Why our own reader: torch.distributed.checkpoint unpickles its metadata, which can run code.
import os
import pickle
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": [
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))],
    "collections": ["OrderedDict"],
    "pathlib": ["PosixPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "WindowsPath"],
}  # fmt: skip
"""Module → names that PyTorch's index of shards takes from it; none of them can run code given in the pickle."""


class IndexUnpickler(pickle._Unpickler):  # the unpickler in C has no method per operation
    """Unpickler of the index of shards that allows the names of ``INDEX_NAMES`` alone, so that no code runs.

    Attributes are set on records of the index alone. On a class they would change it for the whole process.
    """

    def load_build(self) -> None:
        """Set attributes of a record, in place of pickle's own operation."""
        record = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(record, type) or not is_dataclass(record):
            raise pickle.UnpicklingError(f"the index sets attributes of {record!r:.80}")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    @override
    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX_NAMES.get(module, ()):  # exact names: a dotted name could reach what a module imports
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}")


class ShardReader(FileSystemReader):
    """Reader of shards that loads the index with :class:`IndexUnpickler` and refuses files outside the folder."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = IndexUnpickler(file).load()
        names = {info.relative_path for info in index.storage_data.values()}
        for name in names:
            if not isinstance(name, str) or name != os.path.basename(name) or name in ("", os.curdir, os.pardir):  # noqa: PTH119 - a text
                raise pickle.UnpicklingError(f"the index names {name!r:.80}, which lies elsewhere")
        return index


class PlainValues(DefaultLoadPlanner):
    """Load planner that reads values other than tensors with ``weights_only=True``, so that no code runs."""

    @override
    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
