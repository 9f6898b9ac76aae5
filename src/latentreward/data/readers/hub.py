"""Download of single files of a hub data set through the download cache of ``datasets``."""

from collections.abc import Sequence
from pathlib import Path

from latentreward.core.errors import InputError, first_line

LOCATION = "hf://datasets/{}@{}"


def fetch_files(source: str, names: Sequence[str], revision: str | None = None, extract: bool = False) -> list[Path]:
    """Download files of a hub data set, or find them in the cache; return their local paths.

    With ``extract``, archives are unpacked, and the folders with their contents are returned.

    Raises:
        InputError: If the data set or a file does not exist, or the hub cannot be reached.
    """
    from datasets import DownloadManager  # slow to import

    manager = DownloadManager(dataset_name=source, base_path=LOCATION.format(source, revision or "main"))
    try:
        paths = (manager.download_and_extract if extract else manager.download)(list(names))
    except (OSError, ValueError) as error:
        problem = f"no folder {source!r}, and the hub does not give {names[0]} of it"
        raise InputError(f"{problem}: {first_line(error)}") from error
    return [Path(str(path)) for path in paths]


def fetch_split(
    source: str, split: str, ending: str, revision: str | None = None, config: str | None = None
) -> list[tuple[str, Path]]:
    """Download all files of a split of a hub data set; return (published file name, local path) of each, by URL.

    Raises:
        InputError: If the data set or split does not exist, a file has another suffix, or the hub cannot be reached.
    """
    from datasets import DownloadManager, load_dataset_builder  # slow to import

    try:
        builder = load_dataset_builder(source, name=config, revision=revision)
        files = dict(builder.config.data_files or {})
        urls = sorted(files.get(split, []))
        paths = DownloadManager(dataset_name=source).download(urls)
    except (OSError, ValueError) as error:
        problem = f"source: no folder {source!r}, and the hub does not give it"
        raise InputError(f"{problem}: {first_line(error)}") from error
    if not urls or not all(url.endswith(ending) for url in urls):
        kind, splits = ending.removeprefix("."), ", ".join(map(str, files))
        raise InputError(f"split: no {kind} files of {split!r} in {source!r}; it has {splits}")
    return [(url.rsplit("/", 1)[-1], Path(path)) for url, path in zip(urls, paths, strict=True)]
