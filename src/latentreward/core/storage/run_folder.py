"""Record of the settings of a run's output, by which a later run goes on there or is refused."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentreward.core.errors import InputError
from latentreward.core.storage.durable import KEPT, contents, write_file
from latentreward.core.storage.json_files import read_config

DIGEST = re.compile(r", [0-9a-f]{32}\b")  # digest at the end of a fingerprint, which messages leave out


@dataclass(frozen=True)
class RunFolder:
    """Output of a run, and the JSON file that records the settings that the output depends on.

    A record that is damaged or names other settings is refused, so that nothing computed is overwritten.
    """

    output: Path  # File or folder that the run writes
    record: Path  # File with the settings; the files beside it are the run's too
    spec: Mapping[str, Any]  # Settings, as JSON can hold them
    option: str  # Name of the option that chose ``output``
    remedy: str  # What to do if the output is not of these settings
    kept: str = KEPT  # End of the message on a full disk

    def exists(self) -> bool:
        """Tell whether there is a record; raises InputError if there is none, but other files are in its folder."""
        folder = self.record.parent
        found = self.record.is_file()
        if not found and folder.exists() and (not folder.is_dir() or contents(folder)):
            raise InputError(f"{self.option}: {folder} holds other files and no {self.record.name}; {self.remedy}")
        return found

    def compare(self) -> None:
        """Compare the recorded settings with those of this run; raises InputError that names the first difference."""
        if difference := first_difference(read_config(self.record, remedy=self.remedy), self.spec):
            raise InputError(f"{self.option}: {self.output} was begun with {difference}; {self.remedy}")

    def claim(self, made: bool = True) -> None:
        """Write the record, after :meth:`exists` and :meth:`compare` with that of an earlier run.

        Other settings are accepted if the earlier run has not ``made`` anything that depends on them.
        """
        if self.exists() and made:
            self.compare()
        self.write()

    def write(self) -> None:
        """Write the record."""
        write_file(self.record, json.dumps(self.spec, indent=1), self.kept)


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the first setting that differs between two runs; None if none does."""
    before, now = (json.loads(json.dumps(settings)) for settings in (before, now))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return _difference(name, before.get(name), now.get(name))
    return None


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe the difference between two values of the setting ``name``.

    For mappings, describe the first entry that differs. Fingerprints are shown without their digests.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() != now.keys():
            return _difference(name, ", ".join(before), ", ".join(now))
        entry = next(entry for entry in now if before[entry] != now[entry])
        return _difference(f"{name}.{entry}", before[entry], now[entry])
    old, new = quoted(before), quoted(now)
    if old != new:
        return f"{name} {old}, now it is {new}"
    return f"{name} {old}, whose contents (files, prompts or weights behind that name) have changed"


def quoted(value: Any) -> str:
    """Quote a value from JSON in a message: at most 80 characters, without digests."""
    text = "none" if value is None else DIGEST.sub("", json.dumps(value))
    return text if len(text) <= 80 else text[:77] + "..."
