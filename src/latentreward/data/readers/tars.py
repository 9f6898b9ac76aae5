"""Archives: samples in uncompressed tars, members of zip files, and the reader of Pick-a-Pic's tars."""

import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

import pyarrow as pa

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.hub import is_hub_id
from latentreward.core.storage.json_files import UnreadableTextError, decode_text
from latentreward.core.storage.user_files import find_files, is_ignored, whole_file
from latentreward.data.images import TOO_LARGE, ImageError, file_image
from latentreward.data.readers.base import PairReader, content_key
from latentreward.data.readers.json_rows import encodable
from latentreward.data.readers.pair_rows import BadRow, Pair, PairRowParser, Row, choice
from latentreward.data.readers.parquet_store import fetch_split
from latentreward.data.readers.rows import RowReader

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
BITE, BEGINNING = 64, 2**16
"""Bytes read at once of a member of a zip file that cannot be read whole, and bytes of it that are read."""
MOST_BYTES = 2**29
"""Largest member of a zip file that is read: an image of ``images.MAX_PIXELS`` with 16 bits per channel."""
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""Exceptions that ``zipfile`` raises on a member that is damaged, encrypted or compressed by an unknown method."""
DAMAGE = (tarfile.TarError, ValueError, IndexError, RecursionError)
"""Exceptions that tarfile raises on a damaged tar."""

IMAGES, LABELS, PROMPT = ("jpg_0.jpg", "jpg_1.jpg"), ("label_0.txt", "label_1.txt"), "original_prompt.txt"
MEMBERS = (*IMAGES, *LABELS, PROMPT)
"""Members of a sample of Pick-a-Pic."""

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


class ImageArchives:
    """Images in zip files without subfolders, or in the folders that such files were unpacked to.

    Open zip files are not pickled; a forked worker process opens its own.

    Args:
        places: Paths of zip files and folders ("parts"); the name of a part is its file name without ``.zip``.
        allow_outside: Whether links in folders may lead out of them.

    Attributes:
        parts: Name of each part → its path.

    Raises:
        ImageError: If a file is not a whole zip file.
    """

    def __init__(self, places: Sequence[Path], allow_outside: bool = False) -> None:
        self.allow_outside = allow_outside
        self.parts = {place.name.removesuffix(".zip"): place for place in places}
        self._files: dict[tuple[int, str], zipfile.ZipFile] = {}  # by process and part
        for part, place in self.parts.items():
            if not place.is_dir():
                self._open(part)

    def image(self, part: str, name: str) -> ImageRef:
        """Return a reference to image ``name`` of a part: with its bytes for a zip file, with its path for a folder.

        Of a member of a zip file that is damaged or too large, the beginning is returned; decoding then reports what is
        wrong.
        """
        place = self.parts[part]
        if place.is_dir():
            return file_image(place, name, allow_outside=self.allow_outside)
        if name not in self._open(part).NameToInfo:
            return ImageRef(name, path=place / name)  # path below a zip file: decoding reports a missing file
        try:
            return ImageRef(name, self._member(part, name))
        except (ImageError, *ZIP_DAMAGE):
            bites: list[bytes] = []  # small chunks, since the damaged chunk is lost as a whole
            with suppress(*ZIP_DAMAGE), cast(zipfile.ZipExtFile, self._open(part).open(name)) as stream:
                stream.MIN_READ_SIZE = BITE  # the default of 4096 may be more than a whole image
                while len(bites) < BEGINNING // BITE and (bite := stream.read(BITE)):
                    bites.append(bite)
            return ImageRef(name, b"".join(bites))

    def read_rows(self, part: str) -> tuple[bytes, str]:
        """Return content and name (for messages) of the file ``{part}.json`` in a part.

        Raises:
            InputError: If the part has no such file or it cannot be read.
        """
        place, name = self.parts[part], f"{part}.json"
        try:
            data = (place / name).read_bytes() if place.is_dir() else self._member(part, name)
        except (KeyError, *ZIP_DAMAGE) as error:
            raise InputError(f"{place}: no readable {name} in it; download it again") from error
        return data, f"{place}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}

    def _open(self, part: str) -> zipfile.ZipFile:
        if (key := (os.getpid(), part)) not in self._files:
            try:
                self._files[key] = zipfile.ZipFile(whole_file(self.parts[part]))
            except (OSError, zipfile.BadZipFile) as error:
                raise ImageError(f"{self.parts[part]}: not a whole zip file ({error}); download it again") from error
        return self._files[key]

    def _member(self, part: str, name: str) -> bytes:
        archive = self._open(part)
        if (size := archive.getinfo(name).file_size) > MOST_BYTES:
            raise ImageError(f"{self.parts[part]}/{name}: {size} bytes; at most {MOST_BYTES} are read", TOO_LARGE)
        return archive.read(name)


class PickAPicTarReader(RowReader):
    """Reader of Pick-a-Pic tars; image 0 is a, image 1 is b.

    A sample consists of consecutive members with one file name up to the first dot; members with suffixes other than
    ``MEMBERS`` are ignored. The label is ``label_0`` (1, 0, or ½ for a tie). A row is unlabelled if a label is missing
    or not a number, or if the two labels do not add up to 1. A row falls under ``on_error`` if a label is NaN or
    outside [0, 1], or its prompt is too long. A missing prompt is read as an empty prompt; a missing image counts as
    unreadable. Images are named by a hash of their bytes, because the tars give no uid.

    The constructor reads the headers and texts of all tars once, which takes minutes for the whole data set. Rows are
    then read at their offsets, in any order. Tars must be uncompressed.

    Args:
        root: Folder that holds ``*.tar``, directly or in a subfolder named after the split; or one tar; otherwise the
            id of a hub data set, whose tars of this split are then downloaded.
        split: Name of the split.
        revision: Commit, tag or branch of the hub data set; give one, so that the data cannot change.
        drop_identical: Leave out rows whose two images have identical bytes; recommended for training.
        weight: Weight of a row in the loss. ``per_prompt`` is 1 / (number of rows read with the row's prompt), so that
            each prompt counts once, as in the training of PickScore and LRM. ``equal`` is 1 for every row.
        options: ``on_error``, ``max_prompt_chars`` and ``exif``, see :class:`PairReader`. Of a truncated tar, the whole
            samples are kept under ``skip`` and ``placeholder``.

    Raises:
        InputError: If there are no tars or no samples in them, or a rule above is broken under ``on_error: raise``.
    """

    exif = "ignore"

    def __init__(
        self,
        root: PathText,
        split: str = "train",
        *,
        revision: str | None = None,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        **options: Any,
    ) -> None:
        super().__init__("pickapic", split, randomise_sides=False, seed=0, **options)
        self._drop, place = drop_identical, Path(root)
        if place.is_file():
            found = [(place.name, place)]
        elif not place.is_dir() and is_hub_id(str(place)):
            found = fetch_split(str(place), split, ".tar", revision)
        else:
            tars = find_files(place / split, "*.tar") or find_files(place, "*.tar")
            if not tars:
                raise InputError(f"root: no *.tar in {place} or {place / split}; set it to the folder of the tars")
            self.check_inside(place, *tars)
            found = [(tar.name, tar) for tar in tars]
        self._tars = [path for _, path in found]
        parser = PairRowParser(self, self._pairs, columns={"prompt": PROMPT}, sources=None)
        extent = pa.list_(pa.int64(), 2)
        self.table = parser.table(self._samples(found), {"tar": pa.int32(), **dict.fromkeys(IMAGES, extent)})
        if weight == "per_prompt":
            prompts = self.prompts()
            rows_of = Counter(prompts)
            self.table = self.table.append_column("weight", pa.array([1 / rows_of[prompt] for prompt in prompts]))
        empty = f"root: no samples with {', '.join(MEMBERS)} in the tars of {root}; check the folder"
        self.report(f"{root} {split}", empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        """Return references to the images of a sample, with their bytes."""
        with self._tars[row["tar"]].open("rb", buffering=0) as tar:
            contents = [read_extent(tar, row[name]) for name in IMAGES]
        return [ImageRef(content_key(data), data) for data in contents]

    def _samples(self, tars: list[tuple[str, Path]]) -> Iterator[Row]:
        for number, (name, tar) in enumerate(tars):
            for sample in whole_samples(self, tar, IMAGES, (*LABELS, PROMPT), len(MEMBERS)):
                row = {**dict.fromkeys(sample.unreadable, ""), **sample.texts, "sample": sample, "tar": number}
                yield encodable(f"{name}:{sample.key}"), number, row

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        sample = row["sample"]
        images = {image: sample.images.get(image, ABSENT) for image in IMAGES}
        if self._drop and self._identical(self._tars[row["tar"]], *images.values()):
            self.skipped["identical images"] += 1
            return []
        pair = {"tar": row["tar"], **images}
        if PROMPT in sample.unreadable:
            raise BadRow(sample.unreadable[PROMPT], "prompt not readable", [pair])
        try:
            return [{**pair, "label": choice(self, name, [_number(sample.texts.get(one)) for one in LABELS], LABELS)}]
        except BadRow as error:
            error.pairs = [pair]
            raise

    def _identical(self, tar: Path, first: Extent, second: Extent) -> bool:
        if first[1] != second[1] or ABSENT in (first, second):
            return False
        with tar.open("rb", buffering=0) as file:
            return read_extent(file, first) == read_extent(file, second)


def whole_samples(
    reader: PairReader, tar: Path, images: Collection[str], texts: Collection[str], members: int = 0
) -> list[Sample]:
    """Return the samples of a tar; of one that ends early, after ``on_error``, those of as many ``members``."""
    samples, problem = read_samples(tar, images, texts)
    if problem is not None:
        last = [*samples[-1].images, *samples[-1].texts, *samples[-1].unreadable] if samples else []
        samples = samples[:-1] if len(last) < members else samples
        reader.refuse(str(tar), f"{problem}; download it again", "tar not readable to its end")
    return samples


def _number(text: str | None) -> float | None:
    try:
        return None if text is None or "_" in text else float(text)
    except ValueError:
        return None
