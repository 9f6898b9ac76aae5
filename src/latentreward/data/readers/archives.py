"""Images in zip files, read one at a time, each process with file handles of its own."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from latentreward.contracts import ImageRef
from latentreward.data.images import ImageError
from latentreward.errors import InputError

BITE = 64
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""What ``zipfile`` raises on a member that is damaged, encrypted or compressed in a way it does not know."""


class ImageArchives:
    """Flat zip files, or the folders these were unpacked to.

    Open zip files belong to a process: they do not travel to workers, and a forked worker opens its own.

    Args:
        places: Zip files and folders; a part is called by its name without ``.zip``.

    Attributes:
        parts: Place of each part.

    Raises:
        ImageError: If one is no whole zip file.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self.parts = {place.name.removesuffix(".zip"): place for place in places}
        self._start()
        for part, place in self.parts.items():
            if not place.is_dir():
                self._open(part)

    def image(self, part: str, name: str) -> ImageRef:
        """An image by its name in a part, with its bytes if it lies in a zip file.

        Of a damaged member the bytes before the damage are given, for the decoder to judge.
        """
        place = self.parts[part]
        if place.is_dir():
            return ImageRef(name, path=place / name, root=place)
        if name not in self._open(part).NameToInfo:
            return ImageRef(name, path=place / name)  # a zip file is no folder: decoding reports a missing file
        return ImageRef(name, self._read(part, name))

    def read_rows(self, part: str) -> tuple[bytes, str]:
        """Content and name of the JSON file that a part holds under its own name.

        Raises:
            InputError: If it holds none.
        """
        place, name = self.parts[part], f"{part}.json"
        try:
            data = (place / name).read_bytes() if place.is_dir() else self._open(part).read(name)
        except (KeyError, *DAMAGE) as error:
            raise InputError(f"{place}: no readable {name} in it; download it again") from error
        return data, f"{place}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._files: dict[str, zipfile.ZipFile] = {}

    def _open(self, part: str) -> zipfile.ZipFile:
        if self._process != os.getpid():
            self._start()
        if part not in self._files:
            try:
                self._files[part] = zipfile.ZipFile(self.parts[part])
            except (OSError, zipfile.BadZipFile) as error:
                raise ImageError(f"{self.parts[part]}: not a whole zip file ({error}); download it again") from error
        return self._files[part]

    def _read(self, part: str, name: str) -> bytes:
        try:
            return self._open(part).read(name)
        except DAMAGE:
            return self._salvage(part, name)

    def _salvage(self, part: str, name: str) -> bytes:
        """What can be read of a damaged member; small bites, since the one with the damage is lost whole."""
        bites: list[bytes] = []
        try:
            with cast(zipfile.ZipExtFile, self._open(part).open(name)) as stream:
                stream.MIN_READ_SIZE = BITE  # 4096 otherwise, more than a small image
                while bite := stream.read(BITE):
                    bites.append(bite)
        except DAMAGE:
            pass
        return b"".join(bites)
