"""Files of a hub data set as they are, through the download cache of ``datasets``."""

import re
from collections.abc import Sequence
from pathlib import Path

from latentreward.errors import InputError

LOCATION = "hf://datasets/{}@{}"


def is_hub_id(source: str) -> bool:
    """Whether a source has the form ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def fetch_files(source: str, names: Sequence[str], revision: str | None = None, extract: bool = False) -> list[Path]:
    """Download files, or find them in the cache.

    Args:
        source: Id of the data set.
        names: Paths of the files in its repository.
        revision: Commit, tag or branch.
        extract: Unpack archives, and give the folders they were unpacked to.

    Raises:
        InputError: If there is no such data set or file, or the hub cannot be reached.
    """
    from datasets import DownloadManager  # slow to import

    manager = DownloadManager(dataset_name=source, base_path=LOCATION.format(source, revision or "main"))
    try:
        paths = (manager.download_and_extract if extract else manager.download)(list(names))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"no folder {source!r}, and the hub does not give {names[0]} of it: {reason}") from error
    return [Path(str(path)) for path in paths]
