"""The digest of source files sees code, not comments, docstrings or layout."""

from pathlib import Path

import pytest

import latentreward
from tools.source_digests import code_digest, grouped_modules, module_names, source_digest

CODE = '''
"""Module."""
LIMIT = 3


def area(side: float) -> float:
    """Compute an area."""
    return side**2
'''


@pytest.mark.parametrize(
    "same",
    [
        CODE.replace('"""Module."""', "# a comment"),
        CODE.replace('"""Compute an area."""', '"""Other words."""'),
        CODE.replace("return side**2", "return (\n        side**2  # squared\n    )"),
    ],
)
def test_what_does_not_count(same: str) -> None:
    assert code_digest(same) == code_digest(CODE)


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("side**2", "side**3"),
        CODE.replace("LIMIT = 3", "LIMIT = 4"),
        CODE.replace("LIMIT = 3", 'LIMIT = "3"'),
        CODE.replace("area", "size"),
        CODE + "\nx = 1\n",
    ],
)
def test_what_counts(other: str) -> None:
    assert code_digest(other) != code_digest(CODE)


def test_a_text_that_is_no_docstring_counts() -> None:
    assert code_digest("x = 1\n'one'") != code_digest("x = 1\n'two'")


def test_files_of_modules_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latentreward, "__path__", [*latentreward.__path__, str(tmp_path)])
    names = ["latentreward", "latentreward.core.running", "latentreward.toy_module"]
    without = source_digest(names)
    (tmp_path / "toy_module.py").write_text(CODE)
    first = source_digest(names)
    assert first != without
    assert source_digest(reversed(names)) == first
    (tmp_path / "toy_module.py").write_text(CODE + "# more\n")
    assert source_digest(names) == first
    (tmp_path / "toy_module.py").write_text(CODE.replace("3", "30"))
    assert source_digest(names) != first


def test_names_are_grouped_and_back() -> None:
    names = ["latentreward", "latentreward.callbacks.nan_guard", "latentreward.data", "latentreward.data.images"]
    groups = grouped_modules([*names, "latentreward.data"])
    assert groups["latentreward.data"] == "images"
    assert sorted(module_names(groups)) == names
