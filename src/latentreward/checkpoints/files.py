"""Checkpoint files that survive a loss of power, and the choice of the one to go on from."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from latentreward.checkpoints.shards import INDEX, REST, UNREADABLE, read_sharded
from latentreward.errors import InputError, first_line
from latentreward.storage.durable import replacing

logger = logging.getLogger(__name__)

SHARD_FILES = (INDEX, REST)
"""What a checkpoint folder of shards holds beside the shards; both are written last."""
SILENCE_S = 60.0
"""Seconds without a byte after which a server counts as silent."""
KEPT = "the checkpoints written before are kept: free some space and go on with --ckpt_path last"
"""What an error on a full disk says after the checkpoint's name."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has the disk confirm it, and only then gives it its name.

    A kill or a loss of power at any moment leaves the old file or the new one, whole. The command line uses it; in
    Python, ``Trainer(plugins=[DurableCheckpointIO()])``. Reads sharded checkpoints too, so that they load where weights
    are not sharded.

    Note:
        Lightning's own writes to the system's temporary folder, moves the file from there, byte by byte if that is
        another file system, and never waits for the disk.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; an address with a scheme, such as ``s3://``, is Lightning's to write."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path), KEPT) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """See Lightning's ``CheckpointIO``; a folder is read whole, and code never runs, whatever ``weights_only``."""
        if Path(path).is_dir():
            return read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)


def fetched(address: str, folder: Path) -> Path:
    """Copy the checkpoint at an address that fsspec reads into ``folder``; one on this machine stays where it is.

    Raises:
        InputError: If there is none, nothing answers, or there is no room for it.
    """
    options: dict[str, Any] = {}
    if address.startswith("http"):  # fsspec gives up after five minutes in all, which a large file may take
        import aiohttp  # slow to import, and most checkpoints are files

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=SILENCE_S, sock_read=SILENCE_S)}
    target, shown = folder / "fetched.ckpt", without_password(address)
    if re.search(r"(^|:)reference:", address):  # fsspec would render the templates of such a file
        raise InputError(f"ckpt_path: {shown} is a file of references; give the address of the checkpoint itself")
    try:
        system, path = url_to_fs(address, **options)
        if isinstance(system, LocalFileSystem):
            return Path(path)
        system.get_file(path, str(target))
    except Exception as error:  # each file system has errors of its own
        target.unlink(missing_ok=True)
        reason = without_password(first_line(error))
        raise InputError(
            f"ckpt_path: {shown} cannot be fetched ({type(error).__name__}: {reason}); check the address, "
            "or fetch the file yourself and give its path"
        ) from error
    if not target.is_file():
        raise InputError(f"ckpt_path: {shown} is not a file; of a folder of shards, make one file by `consolidate`")
    return target


def without_password(address: str) -> str:
    """Drop the user name and the password from an address, which messages and saved settings should not hold."""
    return re.sub(r"://[^/@]*@", "://", address)


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, in one line, or None; tensors are not read."""
    if path.is_dir():
        missing = [name for name in SHARD_FILES if not (path / name).is_file()]
        return f"{missing[0]} is missing" if missing else None
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except (*UNREADABLE, OSError) as error:
        return first_line(error)
    return None


def newest_intact(candidates: Iterable[Path]) -> Path | None:
    """The newest of ``candidates``; if it is damaged, the newest intact checkpoint of their folders, with a warning.

    Raises:
        InputError: If there are candidates, and neither they nor any checkpoint beside them is intact.
    """
    found = newest_first(path for path in candidates if path.exists())
    if not found:
        return None
    problem = checkpoint_problem(found[0])
    if problem is None:
        return found[0]
    for path in newest_first({path for folder in {path.parent for path in found} for path in folder.glob("*.ckpt")}):
        if path != found[0] and checkpoint_problem(path) is None:
            logger.warning("ckpt_path: %s is damaged (%s); going on from the previous one, %s", found[0], problem, path)
            return path
    raise InputError(
        f"ckpt_path: {found[0]} is damaged ({problem}), and no checkpoint beside it is intact; remove it to start anew"
    )


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sorted by the time of their last change."""
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
