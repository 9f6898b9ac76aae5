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
    """Check that every data set has a folder, and that every model is a folder or a hub id."""
    values = pilot.values()
    unset = [f"{name} ({source.data})" for name, source in pilot.sources.items() if name not in values]
    if unset:
        raise InputError(f"{', '.join(unset)}: not set; export each variable as the folder of its data set")
    for name, value in values.items():
        what = pilot.sources[name].data or "the model"
        if not Path(value).exists() and (pilot.sources[name].data or not is_hub_id(value, folders=True)):
            raise InputError(f"{name}: {value} does not exist; set it to the folder of {what}")


def downloads(pilot: Pilot) -> dict[str, Source]:
    """Return the models that are neither folders nor in the local cache of the hub: variable → model.

    A model counts as cached if half the expected size is there, since files have variants.
    """
    values, found = pilot.values(), {}
    for name, source in pilot.sources.items():
        if source.hub and not Path(values[name]).exists():
            folder = cached_files(values[name])
            files = [path for path in folder.rglob("*") if path.exists()] if folder else []  # links may dangle
            if sum(path.stat().st_size for path in files) < source.gigabytes * GB / 2:
                found[name] = source
    return found


def hub_cache() -> Path:
    """Return the folder into which the hub's files are downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def check_access(pilot: Pilot, missing: Mapping[str, Source]) -> None:
    """Check that the hub gives each missing model to this user; asks for metadata only."""
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
    """
    places = {
        folder: next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists()) for folder in needed
    }
    by_device: dict[int, list[Path]] = {}
    for folder, place in places.items():
        by_device.setdefault(place.stat().st_dev, []).append(folder)
    lines = []
    for folder, *others in by_device.values():
        size, free = sum(needed[one] for one in (folder, *others)), shutil.disk_usage(places[folder]).free
        if size + SPARE > free:
            raise InputError(
                f"disk: {(size + SPARE) / GB:.1f} GB are needed where {folder} is, {free / GB:.1f} GB are free; free "
                "some space, choose another --work or HF_HOME, or fewer --pairs"
            )
        lines.append(f"{size / GB:.1f} GB to write where {folder} is, {free / GB:.1f} GB free")
    return "; ".join(lines)
