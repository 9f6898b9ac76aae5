"""Files that the steps read: pairs and prompts, in folders named by their content."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latentreward.data.alignment.prompt_files import read_prompts
from latentreward.errors import InputError
from latentreward.storage.digests import digest
from latentreward.storage.durable import write_file
from latentreward.taste.pairs import lines
from latentreward.taste.pictures import number_of
from latentreward.taste.plan import JUDGED, PREFERENCES, PROMPTS
from latentreward.taste.splitting import Split

JUDGED_SHARE = 4
"""One of so many prompts is kept for the pictures, where there are enough."""
ENOUGH = 16
"""Prompts from which some are kept for the pictures; of fewer, the same serve for both."""


def write_pairs(work: Path, found: Split) -> Path:
    """Write the pairs of all parts; return their folder, the same for equal pairs."""
    return write_once(work / "pairs", {PREFERENCES: lines(found.parts)})


def write_once(beginning: Path, texts: Mapping[str, str]) -> Path:
    """Write files, by their names, into a folder named by ``beginning`` and by what they hold; return the folder."""
    folder = beginning.with_name(f"{beginning.name}-{digest(texts.values())[:16]}")
    for name, text in texts.items():
        write_file(folder / name, text)
    return folder


def prompts_of(found: Split, file: Path | None) -> tuple[str, ...]:
    """Return the prompts of the alignment: those of a file, or the captions of all pairs.

    Raises:
        InputError: If there is no file and no caption, or the file cannot be read.
    """
    if file is not None:
        if not file.exists():  # the reader would first name the endings that it takes
            raise InputError(f"prompts: {file} does not exist; give a text file with one prompt per line")
        return read_prompts(str(file), "prompts")
    captions = [pair.prompt for pairs in found.parts.values() for pair in pairs if pair.prompt]
    if not captions:
        raise InputError("align needs prompts, and no picture has a caption; give --prompts a file, one prompt a line")
    return tuple(dict.fromkeys(captions))


def write_prompts(work: Path, prompts: Sequence[str], seed: int) -> tuple[Path, str]:
    """Write the prompts to align with, and those to draw pictures for.

    Returns:
        Folder of the two files, and a line on the choice.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    kept = len(prompts) // JUDGED_SHARE if len(prompts) >= ENOUGH else 0
    judged, others = ([prompts[place] for place in some] for some in (order[:kept], order[kept:]))
    texts = {
        name: "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in some)
        for name, some in ((PROMPTS, others), (JUDGED, judged or others))
    }
    folder = write_once(work / "prompts", texts)
    if kept:
        return folder, f"{len(others)} prompts to align with, {kept} others for the pictures before and after"
    told = f"{number_of(len(others), 'prompt')} to align with, and the same for the pictures"
    return folder, f"{told}: give {ENOUGH} to keep some apart"
