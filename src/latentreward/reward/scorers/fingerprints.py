"""Fingerprints of the files and sources that a scorer's scores depend on, so that changed files are noticed."""

import os
import sys
from pathlib import Path
from typing import Any

from latentreward.core.registry import of_this_package
from latentreward.reward.scorers.base import Scorer, code_of
from latentreward.reward.scorers.clip import model_source
from latentreward.reward.scoring.layouts.find import fingerprint
from latentreward.reward.scoring.network import name_of

PLACES = ("path", "weights", "source", "processor", "tokenizer", "base", "config")
"""Names of the attributes of scorers that hold files, folders or hub ids."""


def scorer_fingerprints(scorer: Scorer, policy: str = "") -> dict[str, str]:
    """Return the fingerprints of all files that a scorer names, by attribute.

    These are the attributes in ``PLACES``, with ``policy`` in place of ``{policy}``, the words of ``command`` that are
    files, and the sources of a user's own class and function; of a scorer in the attribute ``scorer`` all the same.
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
