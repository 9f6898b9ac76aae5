"""The commit in which a claim was written is found in the history, and kept for clones that have none."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.reproduction.test_page import result
from tests.tools.reproduction.test_rows import TOY
from tools.reproduction import written
from tools.reproduction.rows import FOLDER, Row, read_row
from tools.reproduction.written import in_full, read_commits, update_commits

OTHER = {"says": "one hardly beats the other", "higher": "one", "lower": "other", "by": "t 1", "more_than": -0.1}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(written, "CLONE", tmp_path)
    Path(tmp_path, FOLDER).mkdir(parents=True)
    git(tmp_path, "init", "-q")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(clone: Path, text: str) -> str:
    """Commit the row's file; return the commit."""
    Path(clone, FOLDER, "toy.yaml").write_text(text)
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "claims")
    return git(clone, "rev-parse", "HEAD")[:10]


def row(*claims: dict[str, object]) -> Row:
    return read_row("toy", {**TOY, "claims": claims})


def test_commits_are_found_once_and_kept(clone: Path) -> None:
    first, second = TOY["claims"][0], OTHER
    assert update_commits(clone, [row(first)], {}) == {}  # there is no commit
    one = commit(clone, "claims:\n  - {says: one beats the other, higher: one}\n")
    assert update_commits(clone, [row(first)], {}) == {"toy": {in_full(row(first).claims[0]): one}}
    both = row(first, second)
    added = "  - {says: one hardly beats the other, higher: one}\n"
    Path(clone, FOLDER, "toy.yaml").write_text("claims:\n  - {says: one beats the other, higher: one}\n" + added)
    assert update_commits(clone, [both], {})["toy"].keys() == {in_full(both.claims[0])}  # the other is not committed
    two = commit(clone, "claims:\n  - {says: one beats the other, higher: one} # a remark\n" + added)
    assert [*update_commits(clone, [both], {})["toy"].values()] == [one, two]
    assert read_commits(clone) == update_commits(clone, [both], {})


@pytest.mark.parametrize(("measured", "late"), [(0, True), (1, False), (None, False)])
@pytest.mark.parametrize(
    ("like", "changed", "written_claim"),
    [("", "", "claims:\n  - {says: one beats the other}\n"), ("first", "+", "like: first\n")],
)
def test_a_claim_that_its_results_do_not_know_is_late(
    measured: int | None, late: bool, like: str, changed: str, written_claim: str, clone: Path
) -> None:
    commits = [commit(clone, text) for text in ("claims: []\n", written_claim)]
    one = replace(row(TOY["claims"][0]), like=like)
    if measured is None:  # a commit that is no part of the history
        git(clone, "commit", "-q", "--allow-empty", "-m", "measured")
        at = git(clone, "rev-parse", "HEAD")[:10]
        git(clone, "reset", "-q", "--hard", commits[0])
        commits[1] = commit(clone, written_claim)
    else:
        at = commits[measured]
    found = {"toy": {0: replace(result(one, 0, {}), commit=at + changed)}}
    assert [*update_commits(clone, [one], found)["toy"].values()] == [commits[1] + written.LATE * late]
    assert update_commits(clone, [one], {}) == {"toy": {in_full(one.claims[0]): commits[1]}}
