"""Fingerprints of the files that the scores of a model or scorer depend on, so that changed files are noticed.

Files that count: for a checkpoint or the folder of a run, the checkpoints and ``config*.yaml``, but not logs; for any
other folder, all files except hidden ones, pictures and ``README.md``. A hub id is identified by its commit. A base
pipeline that a model names in its own settings counts by its name only; give it as ``base`` to compare its contents.

A file of up to ``WHOLE`` bytes, and any table, is hashed in full. Of a larger file the size and ``BLOCKS`` evenly
spread blocks of ``BLOCK`` bytes are hashed. The location does not count: a moved or copied folder has the same
fingerprint.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.core.checkpoints.shards import is_sharded
from latentreward.core.programs import of_this_package
from latentreward.core.storage.hub import commit_on_hub, is_hub_id
from latentreward.reward.scorers.base import Scorer, code_of
from latentreward.reward.scorers.clip import model_source
from latentreward.reward.scoring.layouts.find import published_layout
from latentreward.reward.scoring.layouts.run import configs_beside
from latentreward.reward.scoring.network import name_of

PLACES = ("path", "weights", "source", "processor", "tokenizer", "base", "config")
"""Names of the attributes of scorers that hold files, folders or hub ids."""
WHOLE, BLOCKS, BLOCK = 1 << 24, 64, 1 << 16
"""Size in bytes up to which files are hashed in full; number, and size in bytes, of blocks hashed of larger files."""


def scorer_fingerprints(scorer: Scorer, policy: str = "") -> dict[str, str]:
    """Return the fingerprints of all files that a scorer names, by attribute.

    A scorer may wrap another one in its attribute ``scorer``. The files are those named by the attributes in
    ``PLACES``, with ``policy`` in place of ``{policy}``, the words of ``command`` that are files, and the source files
    of a user's own class and function, though not of what these import.
    """
    inner = getattr(scorer, "scorer", None)
    if isinstance(inner, Scorer):
        return {**scorer_fingerprints(inner, policy), **own_sources(scorer)}
    revision = getattr(scorer, "revision", None)
    named = {name: value for name in PLACES if isinstance(value := getattr(scorer, name, None), (str, Path))}
    of_revision = named.get("source", named.get("path"))
    found = {}
    for name, value in named.items():
        place = model_source(str(value).replace("{policy}", policy))
        found[name] = fingerprint(place, revision if value == of_revision else None)
    for number, word in enumerate(getattr(scorer, "command", ())):
        file = Path(getattr(scorer, "folder", None) or "", word)
        if os.path.isfile(file):  # noqa: PTH113 - pathlib raises for a word that is too long for a file name
            found[f"command {number}"] = fingerprint(file)
    return found | own_sources(scorer)


def own_sources(scorer: Scorer) -> dict[str, str]:
    """Return the fingerprints of the source files of a user's own scorer, and of the function that it calls."""
    found = {}
    for name, part in {type(scorer).__name__: type(scorer), "function": getattr(scorer, "function", None)}.items():
        module = getattr(code_of(part), "__module__", None)
        file = None if of_this_package(module) else getattr(sys.modules.get(module or ""), "__file__", None)
        if file is not None and Path(file).is_file():
            found[f"source of {name}"] = fingerprint(file)
    return found


def public_identity(scorer: Scorer) -> str:
    """Return a scorer's identity for reports, with file names in place of local paths."""
    inner: Any = scorer
    while isinstance(getattr(inner, "scorer", None), Scorer):
        inner = inner.scorer
    places = {*(getattr(inner, name, None) for name in (*PLACES, "folder")), *getattr(inner, "command", ())}
    text = scorer.identity()
    for place in sorted((str(place) for place in places if place), key=len, reverse=True):
        text = text.replace(place, name_of(place)) if os.sep in place else text
    return text


def fingerprint(place: str | Path, revision: str | None = None) -> str:
    """Return one line with the name of a file or folder and a hash of its contents, or a hub id and its commit.

    Other text is returned unchanged. The revision of a hub id is named if the commit is not known.
    """
    path = Path(place)
    if not path.exists():
        if not is_hub_id(str(place), folders=True):
            return str(place)
        return f"{place} at {commit_on_hub(str(place), revision) or revision or 'an unknown commit'}"
    digest, root = hashlib.blake2b(digest_size=16), path if path.is_dir() else path.parent
    for name, file in sorted((os.path.relpath(file, root), file) for file in files_of(path)):
        size = file.stat().st_size
        digest.update(f"{name if path.is_dir() or file != path else ''}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= WHOLE or file.suffix in (".csv", ".json", ".jsonl", ".parquet", ".txt", ".yaml"):
                while block := stream.read(WHOLE):
                    digest.update(block)
                continue
            for start in np.linspace(0, size - BLOCK, BLOCKS).astype(np.int64).tolist():
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return f"{path.absolute().name}, {digest.hexdigest()}"


def files_of(place: Path) -> set[Path]:
    """List the files at ``place`` that scores depend on; see the module's docstring."""
    if place.suffix == ".ckpt" or is_sharded(place):
        return {*_files(place), *configs_beside(place)}
    if place.is_file():
        return {place}
    checkpoints = [*place.rglob("*.ckpt")]
    is_model = any((place / name).exists() for name in ("model_index.json", "config.json", "head.safetensors"))
    if checkpoints and not is_model and not published_layout(place):
        return {file for path in checkpoints for file in (*_files(path), *configs_beside(path))}
    return {
        file
        for file in _files(place)
        if not any(part.startswith(".") for part in file.relative_to(place).parts)
        and file.name != "README.md"
        and file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp")
    }


def _files(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
