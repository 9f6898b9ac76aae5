"""``latentreward configs``: list or print the YAML files that come with the package."""

import re
from functools import partial
from itertools import groupby, takewhile
from pathlib import PurePosixPath

from latentreward.errors import InputError, did_you_mean
from latentreward.settings.functions import run_function
from latentreward.settings.rewriting import shipped_configs

LONGEST = 110
"""Most characters of a summary that is shown whole; a longer summary is cut at its first colon."""


def configs(name: str | None = None) -> None:
    """List the YAML files that come with the package, by kind, or print one.

    Any command accepts a listed file as ``--config configs/NAME``, from any working directory. The list shows the
    environment variables that a file needs in brackets.

    Args:
        name: File to print, e.g. model/lrm_sd15.yaml, or folder to list, e.g. model; all files are listed by default.

    Raises:
        InputError: If there is no such file or kind.
    """
    shipped = shipped_configs()
    wanted = "" if name is None else name.removeprefix("configs/").strip("/")
    if wanted in shipped:
        print(shipped[wanted].read_text(encoding="utf-8"), end="")
        return
    files = sorted((PurePosixPath(one) for one in shipped), key=lambda file: (file.parent, file.name))
    chosen = [file for file in files if wanted in ("", *map(str, file.parents))]
    if not chosen:
        raise InputError(
            f"name: no shipped file {name!r}{did_you_mean(wanted, [*shipped, *{str(f.parent) for f in files}])}"
        )
    width = max(len(file.name) for file in chosen)
    for kind, group in groupby(chosen, lambda file: file.parent):
        print(f"{kind}/")
        for file in group:
            print(f"  {file.name:{width}}  {summary(shipped[str(file)].read_text(encoding='utf-8'))}")


def summary(text: str) -> str:
    """Return the first sentence of a file's head comment, without sources in parentheses, and variables it needs."""
    lines = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    comment = re.sub(r"\s\([^()]*[A-Za-z]{2}[^()]*\)", "", "\n".join(lines))
    sentence = " ".join(re.split(r"[.;](?:\s|$)|:(?:\n|$)", comment, maxsplit=1)[0].split())
    sentence = sentence if len(sentence) <= LONGEST else sentence.partition(": ")[0]
    variables = dict.fromkeys(re.findall(r"\$\{oc\.env:(\w+)\}", text))
    return sentence + (f" [{', '.join(variables)}]" if variables else "")


run = partial(run_function, configs, classes=False)
