"""Commits in which claims were written, kept beside the results for clones without history, with a mark if late."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

from latentreward.core.storage.durable import write_file
from latentreward.core.storage.json_files import checked, read_config
from tools.measured import CLONE
from tools.reproduction.results import Result
from tools.reproduction.rows import FOLDER, Claim, Row

FILE = "claims.json"
"""File in the folder of the results: name of a row → claim in full → commit, and :data:`LATE` where that is so."""
EARLIER = "configs/reproduce"
"""Folder of the rows at the time of most measurements."""
LATE = " late"
"""Mark of a claim that is not in a commit at which its row was measured."""
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


def update_commits(folder: Path, rows: Iterable[Row], found: Mapping[str, Mapping[int, Result]]) -> Commits:
    """Look up the commits of claims that are not known, or whose commit was rewritten, if there is a whole history.

    ``found`` has the results of each row by seed. A claim that is not in all commits of these is marked as late.
    """
    known, git = read_commits(folder), partial(subprocess.run, cwd=CLONE, text=True, capture_output=True)
    shallow, log = (git(["git", *words]) for words in (("rev-parse", "--is-shallow-repository"), ("rev-list", "HEAD")))
    if shallow.stdout.strip() != "false":  # without git or a history too
        return known
    history, new = {line[:10] for line in log.stdout.split()}, dict[str, dict[str, str]]()

    @cache
    def lines_at(commit: str, row: str) -> list[str]:
        shown = (git(["git", "show", f"{commit}:{folder}/{row}.yaml"]).stdout for folder in (FOLDER, EARLIER))
        return next(filter(None, shown), "").splitlines()

    for row in rows:
        kept = {claim: text.removesuffix(LATE) for claim, text in known.get(row.name, {}).items()}
        commits = {claim: commit for claim, commit in kept.items() if commit in history}
        blamed = ["git", "blame", "-sw", "--root", "--abbrev=9", "--", f"{FOLDER}/{row.name}.yaml"]
        if missing := [claim for claim in row.claims if in_full(claim) not in commits]:
            lines = git(blamed).stdout.splitlines()
            commits |= {in_full(claim): next(_lines_of(claim, row, lines), "")[:10] for claim in missing}
        named = {claim: commit for claim in row.claims if (commit := commits[in_full(claim)]) in history}
        measured = {result.commit.removesuffix("+") for result in found.get(row.name, {}).values()} & history
        marked = dict[str, str]()
        for claim, commit in named.items():
            line = next(_lines_of(claim, row, lines_at(commit, row.name)), "")
            late = any(line not in lines_at(one, row.name) for one in measured)
            marked[in_full(claim)] = commit + LATE * late
        if marked:
            new[row.name] = marked
    if new != known:
        write_file(folder / FILE, json.dumps(new, indent=1, ensure_ascii=False) + "\n")
    return new


def _lines_of(claim: Claim, row: Row, lines: list[str]) -> Iterator[str]:
    """Find the lines of a row's file that hold a claim, or that name the row with the same claims."""
    yield from (line for line in lines if "says:" in line and claim.says in line)
    yield from (line for line in lines if line.split()[-2:] == ["like:", row.like])
