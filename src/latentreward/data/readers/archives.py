"""Access to single images in zip files, with open files of each process's own."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from latentreward.core.contracts import ImageRef
from latentreward.core.errors import InputError
from latentreward.core.storage.user_files import whole_file
from latentreward.data.images import TOO_LARGE, ImageError, file_image

BITE, BEGINNING = 64, 2**16
"""Bytes read at once of a member that cannot be read whole, and bytes of it that are read."""
MOST_BYTES = 2**29
"""Largest member of a zip file that is read: an image of ``images.MAX_PIXELS`` with 16 bits per channel."""
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""Exceptions that ``zipfile`` raises on a member that is damaged, encrypted or compressed by an unknown method."""


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
        except (ImageError, *DAMAGE):
            bites: list[bytes] = []  # small chunks, since the damaged chunk is lost as a whole
            with suppress(*DAMAGE), cast(zipfile.ZipExtFile, self._open(part).open(name)) as stream:
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
        except (KeyError, *DAMAGE) as error:
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
