"""Archives: samples in uncompressed tars, members of zip files, and the reader of Pick-a-Pic's tars."""

import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import pyarrow as pa
from PIL import Image

from latentreward.core.contracts import ImageRef, PathText
from latentreward.core.errors import InputError, first_line
from latentreward.core.storage.user_files import find_files, is_ignored, whole_file
from latentreward.data.images import ImageError, file_image, png
from latentreward.data.readers.base import content_key
from latentreward.data.readers.json_rows import encodable
from latentreward.data.readers.rows import BadRow, Pair, PairRowParser, Row, RowReader, choice

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
MOST_BYTES = 2**29
"""Largest member of a zip file that is read: an image of ``images.MAX_PIXELS`` with 16 bits per channel."""
CUT_OFF = png(Image.new("L", (1, 1)))[:45]
"""Part of a picture, in the place of a member of a zip file that cannot be read: decoding it tells of the damage."""
ZIP_DAMAGE = (ImageError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""Exceptions about a member that is too large, damaged, encrypted or compressed by an unknown method."""
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
    images: dict[str, Extent] = field(default_factory=dict)
    texts: dict[str, str | None] = field(default_factory=dict)  # None for a text that is too long or not UTF-8


def read_samples(tar: Path) -> tuple[list[Sample], str | None]:
    """Read the samples of an uncompressed tar; also return a description of its damage, None for none.

    A sample that the damage cuts off is left out.
    """
    members, problem = _scan(whole_file(tar))
    samples: list[Sample] = []
    with tar.open("rb", buffering=0) as file:
        for path, extent in members:
            folder, _, base = path.removeprefix("./").rpartition("/")
            stem, _, name = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if name not in MEMBERS or is_ignored(path):
                continue
            if not samples or samples[-1].key != key:
                samples.append(Sample(key))
            if name in IMAGES:
                samples[-1].images[name] = extent
                continue
            try:
                text = (read_extent(file, extent) or b"").decode() if extent[1] <= MAX_TEXT else None
            except UnicodeDecodeError:
                text = None
            samples[-1].texts[name] = text
    if problem and samples and len(samples[-1].images) + len(samples[-1].texts) < len(MEMBERS):
        samples.pop()
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
    """Images in zip files without subfolders, or in the folders that such files were unpacked to ("parts").

    Open zip files are not pickled; a forked worker process opens its own. ``parts`` are their paths by file name
    without ``.zip``. ``allow_outside`` tells whether links in folders may lead out of them.
    """

    def __init__(self, places: Sequence[Path], allow_outside: bool = False) -> None:
        self.allow_outside = allow_outside
        self.parts = {place.name.removesuffix(".zip"): place for place in places}
        self._files: dict[tuple[int, str], zipfile.ZipFile] = {}  # by process and part
        for part, place in self.parts.items():
            if not place.is_dir():
                self._open(part)

    def image(self, part: str, name: str) -> ImageRef:
        """Return a reference to image ``name`` of a part: with its bytes for a zip file, with its path for a folder."""
        place = self.parts[part]
        if place.is_dir():
            return file_image(place, name, allow_outside=self.allow_outside)
        if name not in self._open(part).NameToInfo:
            return ImageRef(name, path=place / name)  # path below a zip file: decoding reports a missing file
        try:
            return ImageRef(name, self._member(part, name))
        except ZIP_DAMAGE:
            return ImageRef(name, CUT_OFF)

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
            raise ImageError(f"{size} bytes; at most {MOST_BYTES} are read")
        return archive.read(name)


class PickAPicTarReader(RowReader):
    """Reader of Pick-a-Pic tars; image 0 is a, image 1 is b.

    A sample consists of consecutive members with one file name up to the first dot; members with suffixes other than
    ``MEMBERS`` are ignored. Labels are as those of :class:`PickAPicReader`; one that is no number is a missing one. A
    missing prompt is read as an empty prompt; a missing image counts as unreadable. Images are named by a hash of their
    bytes, because the tars give no uid.

    The constructor reads the headers and texts of all tars once, which takes minutes for the whole data set. Rows are
    then read at their offsets, in any order. Tars must be uncompressed. Of one that ends early, the whole samples are
    kept under ``skip`` and ``placeholder``.

    Args:
        root: Folder that holds ``*.tar``, directly or in a subfolder named after the split; or one tar.
        split: Name of the split.
        drop_identical: Leave out rows whose two images have identical bytes; recommended for training.
        weight: Weight of a row in the loss: ``per_prompt`` is 1 / (number of rows read with the row's prompt),
            ``equal`` is 1 for every row.
        options: See :class:`~latentreward.data.readers.rows.RowReader`.
    """

    exif, winner_first = "ignore", False

    def __init__(
        self,
        root: PathText,
        split: str = "train",
        *,
        drop_identical: bool = False,
        weight: Literal["per_prompt", "equal"] = "per_prompt",
        **options: Any,
    ) -> None:
        super().__init__("pickapic", split, **options)
        self._drop, place = drop_identical, Path(root)
        self._tars = [place]
        if not place.is_file():
            self._tars = find_files(place / split, "*.tar") or find_files(place, "*.tar")
            if not self._tars:
                raise InputError(f"root: no *.tar in {place} or {place / split}; set it to the folder of the tars")
            self.check_inside(place, *self._tars)
        parser = PairRowParser(self, self._pairs, columns={"prompt": PROMPT}, sources=None)
        extent = pa.list_(pa.int64(), 2)
        self.table = parser.table(self._samples(), {"tar": pa.int32(), **dict.fromkeys(IMAGES, extent)})
        if weight == "per_prompt":
            prompts = self.prompts()
            rows_of = Counter(prompts)
            self.table = self.table.append_column("weight", pa.array([1 / rows_of[prompt] for prompt in prompts]))
        empty = f"root: no samples with {', '.join(MEMBERS)} in the tars of {root}; check the folder"
        self.report(f"{root} {split}", empty)

    def find_images(self, row: dict[str, Any]) -> list[ImageRef]:
        if row.get("tar") is None:  # a placeholder
            return [ImageRef("")] * 2
        with self._tars[row["tar"]].open("rb", buffering=0) as tar:
            contents = [read_extent(tar, row[name]) for name in IMAGES]
        return [ImageRef(content_key(data), data) for data in contents]

    def _samples(self) -> Iterator[Row]:
        for number, tar in enumerate(self._tars):
            samples, problem = read_samples(tar)
            if problem is not None:
                self.refuse(str(tar), f"{problem}; download it again", "tar not readable to its end")
            for sample in samples:
                prompt = sample.texts.get(PROMPT) or ("" if PROMPT in sample.texts else None)
                row = {PROMPT: prompt, "sample": sample, "tar": number}
                yield encodable(f"{tar.name}:{sample.key}"), number, row

    def _pairs(self, name: str, row: dict[str, Any]) -> list[Pair]:
        sample = row["sample"]
        images = {image: sample.images.get(image, ABSENT) for image in IMAGES}
        if self._drop and self._identical(self._tars[row["tar"]], *images.values()):
            self.skipped["identical images"] += 1
            return []
        if PROMPT in sample.texts and sample.texts[PROMPT] is None:
            raise BadRow(f"{PROMPT} is too long, or not UTF-8", "prompt not readable")
        label = choice(self, {one: _number(sample.texts.get(one)) for one in LABELS})
        return [{"tar": row["tar"], **images, "label": label}]

    def _identical(self, tar: Path, first: Extent, second: Extent) -> bool:
        if first[1] != second[1] or ABSENT in (first, second):
            return False
        with tar.open("rb", buffering=0) as file:
            return read_extent(file, first) == read_extent(file, second)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None or "_" in text else float(text)
    except ValueError:
        return None
