"""Access to samples in uncompressed tars: consecutive members whose names are equal up to the first dot."""

import os
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from latentreward.core.errors import first_line
from latentreward.core.storage.json_files import UnreadableTextError, decode_text
from latentreward.core.storage.user_files import is_ignored, whole_file

ABSENT = (-1, 0)
MAX_TEXT = 1 << 20
"""Bytes of the longest text that is read."""
MAX_HEADER = 1 << 16
"""Bytes of the longest name or pax header that is read; Linux allows paths of 4096 bytes and attributes of 64 KiB."""
READ_AT_ONCE = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of headers whose data tarfile reads into memory at once."""
DAMAGE = (tarfile.TarError, ValueError, IndexError, RecursionError)
"""Exceptions that tarfile raises on a damaged tar."""

Extent = tuple[int, int]
"""Offset and length of a member in its tar, in bytes."""


@dataclass
class Sample:
    """One sample of a tar; its members are named by the rest of their file names, e.g. ``jpg_0.jpg``."""

    key: str  # path of its members, up to the first dot of the file name
    images: dict[str, Extent] = field(default_factory=dict)  # offset and length
    texts: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)  # what is wrong with a text that is not UTF-8


def read_samples(tar: Path, images: Collection[str], texts: Collection[str]) -> tuple[list[Sample], str | None]:
    """Read the headers and texts of an uncompressed tar; also return a description of its damage, None for none.

    Members whose file names end with one of ``images`` or ``texts`` after the first dot are read, others are ignored.
    The last sample of a damaged tar may not be whole.
    """
    members, problem = _scan(whole_file(tar))
    samples: list[Sample] = []
    with tar.open("rb", buffering=0) as file:
        for path, extent in members:
            folder, _, base = path.removeprefix("./").rpartition("/")
            stem, _, name = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if (name not in images and name not in texts) or is_ignored(path):
                continue
            if not samples or samples[-1].key != key:
                samples.append(Sample(key))
            if name in images:
                samples[-1].images[name] = extent
            elif extent[1] <= MAX_TEXT:
                try:
                    samples[-1].texts[name] = decode_text(read_extent(file, extent) or b"", name)
                except UnreadableTextError as error:
                    samples[-1].unreadable[name] = str(error)
    return samples, problem


def read_extent(file: BinaryIO, extent: Extent | list[int]) -> bytes | None:
    """Read the bytes of a member, fewer if the file was shortened since; None if the extent is ``ABSENT``."""
    offset, size = extent
    return None if offset < 0 else os.pread(file.fileno(), size, offset)


class _Member(tarfile.TarInfo):
    """Header of a member; tarfile itself allocates the memory that a header asks for."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header; a name or pax header of an impossible size is refused before it is read."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in READ_AT_ONCE and not 0 <= member.size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def _scan(tar: Path) -> tuple[list[tuple[str, Extent]], str | None]:
    """List the whole members of a tar, as (name, extent), and describe the damage of the tar; None if it has none."""
    members, size = [], tar.stat().st_size
    try:
        with tarfile.open(tar, "r:", tarinfo=_Member) as archive:
            for member in archive:
                if member.size < 0 or archive.offset < member.offset_data:  # tarfile would go back and never end
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if member.isreg() and member.offset_data + member.size <= size:
                    members.append((member.name, (member.offset_data, member.size)))
                if archive.offset > size:  # tarfile would try to go there, which fails for offsets of 2^63 and more
                    raise tarfile.ReadError("unexpected end of data")
            # tarfile stops without an error both at a damaged header and at the zeros that end a whole tar
            end = archive.offset
    except DAMAGE as error:
        return members, f"{'the tar ends early' if members else 'not an uncompressed tar'} ({first_line(error)})"
    with tar.open("rb", buffering=0) as file:
        whole = read_extent(file, (end, tarfile.BLOCKSIZE)) == bytes(tarfile.BLOCKSIZE)
    return members, None if whole else f"the tar ends early (at byte {end} of {size})"
