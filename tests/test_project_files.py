"""Files around the package fit it and each other: versions, workflows, forms, Dockerfile, hooks, AGENTS.md."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentreward import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # as GitHub: `on` is no boolean


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_version_is_the_same_everywhere() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == __version__
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == __version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_there(path: Path) -> None:
    workflow = read(path)
    text = "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)", text)) <= set(targets[1].split())
    releases = [one["releases"] for job in workflow["jobs"].values()
                for one in job.get("strategy", {}).get("matrix", {}).get("include", [])]  # fmt: skip
    named = re.findall(r"(?:^|\s)\.ci/(\w+)", text)
    if ".ci/${{ matrix.releases }}" in text:
        named += releases
    assert all(os.access(ROOT / ".ci" / name, os.X_OK) for name in named), named
    triggers = [one for one in workflow["on"].values() if one]
    paths = [path for one in triggers if isinstance(one, dict) for path in one.get("paths", [])]
    assert all(any(ROOT.glob(path)) for path in paths), paths


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_but_for_the_job_that_publishes(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    writing = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    expected = {
        "docs": {"deploy": {"pages": "write", "id-token": "write"}},
        "release": {"publish": {"id-token": "write"}},
    }
    assert writing == expected.get(path.stem, {})
    for name in writing:  # it takes what another job built, and runs nothing of the checkout
        assert all("run" not in step and "checkout" not in step["uses"] for step in workflow["jobs"][name]["steps"])
    assert "secrets." not in path.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """A tag can be moved to other code; dependabot renews commit and comment together."""
    used = re.findall(r"uses: (.+)", path.read_text())
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used), used
