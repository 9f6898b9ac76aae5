"""The command `reproduce` runs the program of a clone, which the wheel leaves out."""

from pathlib import Path

import pytest

from latentreward.apps.commands import reproduce
from latentreward.cli import main


def test_rows_of_a_clone_are_listed_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["reproduce", "lrm_pretraining", "--status"])
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["lrm_pretraining", "0", "of", "3"]
    with pytest.raises(SystemExit):
        main(["reproduce", "lrm_pretrainin", "--status"])
    assert "names: there is no row 'lrm_pretrainin'; did you mean" in capsys.readouterr().err


def test_without_a_clone_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "CLONE", tmp_path)
    with pytest.raises(SystemExit):
        main(["reproduce", "--status"])
    assert f"{tmp_path} has no tools/reproduce.py" in (said := capsys.readouterr().err)
    assert "from a clone of its repository, by `pip install -e .`" in said
