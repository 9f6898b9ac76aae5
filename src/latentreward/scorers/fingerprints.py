"""Which files a model's or scorer's numbers depend on, and what tells their contents from others.

Of a checkpoint or the folder of a run these are checkpoints and ``config*.yaml``, so that logs may go on; of any other
folder all files but model cards, pictures and what is hidden. A hub id is told by the commit it stands for. A base that
a model names itself is known by that name alone: give it as ``base`` to have its contents compared too.

Contents are read whole up to ``WHOLE`` bytes and in tables; of larger files, ``BLOCKS`` blocks and the size count.
Places do not: a folder that was moved or copied is the same.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentreward.checkpoints.shards import is_sharded
from latentreward.scorers.base import Scorer
from latentreward.scorers.clip import model_source
from latentreward.scoring.layouts.find import published_layout
from latentreward.scoring.network import name_of
from latentreward.storage.hub import commit_on_hub

PLACES = (
    *("path", "weights", "source", "processor", "tokenizer"),
    *("base", "config", "results", "model_path", "model_config"),
)
"""Attributes of scorers that name files, folders or hub ids."""
POLICY = "{policy}"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")
MODEL_MARKS = ("model_index.json", "config.json", "head.safetensors")
"""A folder with one of these is a model, whatever checkpoints lie in it."""
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".yaml")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
WHOLE, BLOCKS, BLOCK = 1 << 24, 64, 1 << 16


def scorer_fingerprints(scorer: Scorer, policy: str = "") -> dict[str, str]:
    """Fingerprint of each place that an attribute of a scorer names; those of the scorer that it wraps, if any.

    Args:
        scorer: Scorer, whose files are those that its attributes of ``PLACES`` name, and the words of its ``command``.
        policy: What ``{policy}`` stands for in a place.
    """
    inner = getattr(scorer, "scorer", None)
    if isinstance(inner, Scorer):
        return scorer_fingerprints(inner, policy)
    revision = getattr(scorer, "revision", None)
    named = {name: value for name in PLACES if isinstance(value := getattr(scorer, name, None), (str, Path))}
    of_revision = named.get("source", named.get("path"))
    found = {
        name: fingerprint(
            model_source(str(value).replace(POLICY, policy)),
            revision if value == of_revision else None,
        )
        for name, value in named.items()
    }
    words = [Path(getattr(scorer, "folder", None) or "", word) for word in getattr(scorer, "command", ())]
    return found | {f"command {n}": fingerprint(word) for n, word in enumerate(words) if _is_file(word)}


def public_identity(scorer: Scorer) -> str:
    """Identity of a scorer for reports: files and folders of this machine by their names alone."""
    inner: Any = scorer
    while isinstance(getattr(inner, "scorer", None), Scorer):
        inner = inner.scorer
    places = {*(getattr(inner, name, None) for name in (*PLACES, "folder")), *getattr(inner, "command", ())}
    text = scorer.identity()
    for place in sorted((str(place) for place in places if place), key=len, reverse=True):
        text = text.replace(place, name_of(place)) if os.sep in place else text
    return text


def fingerprint(place: str | Path, revision: str | None = None) -> str:
    """One line: the name and a digest of what lies at ``place``; of a hub id, the id and its commit, if it is known.

    Args:
        place: File, folder or hub id.
        revision: Branch, tag or commit of a hub id.
    """
    path = Path(place)
    if not path.exists():
        at = commit_on_hub(str(place), revision) if _is_hub_id(str(place)) else None
        return f"{place} at {at or revision or 'an unknown commit'}" if _is_hub_id(str(place)) else str(place)
    digest, root = hashlib.blake2b(digest_size=16), path if path.is_dir() else path.parent
    for name, file in sorted((os.path.relpath(file, root), file) for file in files_of(path)):
        digest.update(f"{name if path.is_dir() or file != path else ''}\0{file.stat().st_size}\0".encode())
        _add_content(digest, file)
    return f"{path.absolute().name}, {digest.hexdigest()}"


def files_of(place: Path) -> set[Path]:
    """Files at ``place`` that numbers depend on."""
    if place.suffix == ".ckpt" or is_sharded(place):
        return {*_files(place), *_settings_beside([place])}
    if place.is_file():
        return {place}
    checkpoints = [*place.rglob("*.ckpt")]
    if checkpoints and not any((place / name).exists() for name in MODEL_MARKS) and not published_layout(place, None):
        return {file for path in checkpoints for file in _files(path)} | {*_settings_beside(checkpoints)}
    return {file for file in _files(place) if _matters(file.relative_to(place))}


def _is_file(word: Path) -> bool:
    try:
        return word.is_file()
    except OSError:  # too long for a name
        return False


def _files(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]


def _settings_beside(checkpoints: Iterable[Path]) -> Iterable[Path]:
    """Settings of runs as loading looks for them: beside a checkpoint, else one folder up."""
    for checkpoint in checkpoints:
        folders = (checkpoint.absolute().parent, checkpoint.absolute().parent.parent)
        yield from next(filter(None, (list(folder.glob("config*.yaml")) for folder in folders)), [])


def _matters(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and name.name != "README.md" and name.suffix.lower() not in PICTURES


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".ckpt")


def _add_content(digest: hashlib.blake2b, file: Path) -> None:
    """Bytes of a file, or of blocks spread over a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE or file.suffix in TABLES:
            while block := stream.read(WHOLE):
                digest.update(block)
            return
        for start in np.linspace(0, size - BLOCK, BLOCKS).astype(np.int64).tolist():
            stream.seek(start)
            digest.update(stream.read(BLOCK))
