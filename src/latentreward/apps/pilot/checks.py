"""Checks of what a pilot needs, made before anything is downloaded or the libraries of models are imported."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from latentreward.apps.pilot.plans import Pilot, Source
from latentreward.errors import InputError, first_line
from latentreward.storage.hub import cached_files, is_hub_id, model_info, silence, split_id

GB = 10**9
SPARE = 5 * GB
"""Disk space that should stay free, for logs, pages and pictures."""


def check_sources(pilot: Pilot) -> None:
    """Check that every data set has a folder, and that every model is a folder or a hub id.

    Raises:
        InputError: If a variable is not set, or names a folder that does not exist.
    """
    values = pilot.values()
    unset = [f"{name} ({source.data})" for name, source in pilot.sources.items() if name not in values]
    if unset:
        raise InputError(f"{', '.join(unset)}: not set; export each variable as the folder of its data set")
    for name, value in values.items():
        what = pilot.sources[name].data or "the model"
        if not Path(value).exists() and (pilot.sources[name].data or not is_hub_id(value, folders=True)):
            raise InputError(f"{name}: {value} does not exist; set it to the folder of {what}")


def downloads(pilot: Pilot) -> dict[str, Source]:
    """Return the models that are neither folders nor in the local cache of the hub: variable → model."""
    values = pilot.values()
    return {
        name: source
        for name, source in pilot.sources.items()
        if source.hub and not Path(values[name]).exists() and not _is_cached(values[name], source)
    }


def _is_cached(value: str, source: Source) -> bool:
    """Tell whether the local cache has a model; half the expected size counts as all, since files have variants."""
    folder = cached_files(value)
    files = folder.rglob("*") if folder else ()
    return sum(path.stat().st_size for path in files if path.exists()) >= source.gigabytes * GB / 2  # links may dangle


def hub_cache() -> Path:
    """Return the folder into which the hub's files are downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def check_access(pilot: Pilot, missing: Mapping[str, Source]) -> None:
    """Check that the hub gives each missing model to this user; asks for metadata only.

    Raises:
        InputError: If there is no token for a gated model, or the hub refuses a model or does not answer.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for name, source in missing.items():
        repository, _ = split_id(pilot.values()[name])
        terms = f"accept its terms ({source.licence}) at https://huggingface.co/{repository}"
        if source.gated and not get_token():
            raise InputError(
                f"{name}: {repository} is gated and there is no token; {terms}, then run `hf auth login` or set "
                "HF_TOKEN"
            )
        try:
            info = model_info(repository)
        except (HfHubHTTPError, HFValidationError) as error:
            remedy = terms if source.gated else "check the name"
            raise InputError(f"{name}: the hub refuses {repository} ({first_line(error)}); {remedy}") from error
        if info is None:
            raise InputError(f"{name}: {silence()}, and {repository} is not here; set {name} to a folder of the model")


def check_disk(needed: Mapping[Path, int]) -> str:
    """Check the free space of file systems; return a line that describes it.

    ``needed`` holds the bytes that will be written, by folder; a folder need not exist.

    Raises:
        InputError: If a file system has too little free space.
    """
    places = {
        folder: next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists()) for folder in needed
    }
    totals: dict[int, int] = {}
    for folder, place in places.items():
        device = place.stat().st_dev
        totals[device] = totals.get(device, 0) + needed[folder]
    lines = []
    for folder, place in places.items():
        device = place.stat().st_dev
        if device not in totals:
            continue
        size, free = totals.pop(device), shutil.disk_usage(place).free
        if size + SPARE > free:
            raise InputError(
                f"disk: {(size + SPARE) / GB:.1f} GB are needed where {folder} is, {free / GB:.1f} GB are free; free "
                "some space, choose another --work or HF_HOME, or fewer --pairs"
            )
        lines.append(f"{size / GB:.1f} GB to write where {folder} is, {free / GB:.1f} GB free")
    return "; ".join(lines)
