"""Commits in which claims were written, kept beside the results for clones without history."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from latentreward.apps.steps.sources import CLONE
from latentreward.storage.durable import write_file
from latentreward.storage.json_files import checked, read_config
from tools.reproduction.rows import FOLDER, Claim, Row

FILE = "claims.json"
"""File in the folder of the results: name of a row → claim in full → commit."""
Commits = Mapping[str, Mapping[str, str]]


def in_full(claim: Claim) -> str:
    """Return what a claim says and compares; a claim that compares something else is another claim."""
    return f"{claim.says}: {compared(claim)}"


def compared(claim: Claim) -> str:
    """Return the two sides of a claim, and what their difference should exceed."""
    higher, lower = claim.higher, claim.lower
    sides = [f"{higher.arm} ({higher.metric})"]
    if lower is not None:
        sides.append(lower.arm if lower.metric == higher.metric else f"{lower.arm} ({lower.metric})")
    return " > ".join(sides) + (f" by more than {claim.more_than:g}" if claim.more_than else "")


def read_commits(folder: Path) -> Commits:
    """Read the commits of claims from the folder of the results."""
    path = folder / FILE
    found: Commits = checked(dict[str, dict[str, str]], read_config(path), f"{path}: ") if path.is_file() else {}
    return found


def update_commits(folder: Path, rows: Iterable[Row]) -> Commits:
    """Look up the commits of claims that are not known, or whose commit was rewritten, if there is a whole history."""
    known, git = read_commits(folder), partial(subprocess.run, cwd=CLONE, text=True, capture_output=True)
    shallow, log = (git(["git", *words]) for words in (("rev-parse", "--is-shallow-repository"), ("rev-list", "HEAD")))
    if shallow.stdout.strip() != "false":  # without git or a history too
        return known
    history, found = {line[:10] for line in log.stdout.split()}, dict[str, dict[str, str]]()
    for row in rows:
        commits = {claim: commit for claim, commit in known.get(row.name, {}).items() if commit in history}
        if missing := [claim for claim in row.claims if in_full(claim) not in commits]:
            blamed = git(
                ["git", "blame", "-sw", "--root", "--abbrev=9", "--", f"configs/{FOLDER}{row.name}.yaml"]
            ).stdout
            for claim in missing:
                lines = [line for line in blamed.splitlines() if "says:" in line and claim.says in line]
                lines += [line for line in blamed.splitlines() if line.endswith(f" like: {row.like}")]
                commits[in_full(claim)] = next(iter(lines), "")[:10]
        named = {in_full(claim): commits[in_full(claim)] for claim in row.claims}
        if kept := {name: commit for name, commit in named.items() if commit in history}:
            found[row.name] = kept
    if found != known:
        write_file(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found
