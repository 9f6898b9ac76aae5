"""``latentreward configs``: lists the shipped YAML files, prints one; docs/configs.md holds the same list."""

import re
from pathlib import Path

import pytest

from latentreward.cli import main
from tests.settings.test_refusals import refusal

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = {path.relative_to(ROOT / "configs").as_posix(): path for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def listed(capsys: pytest.CaptureFixture[str], *name: str) -> dict[str, str]:
    """Name of each file -> what the list says of it."""
    main(["configs", *name])
    kind, found = "", {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(" "):
            file, summary = line.split(maxsplit=1)
            found[kind + file] = summary
        else:
            kind = line
    return found


def test_every_shipped_file_is_listed_with_what_it_is(capsys) -> None:
    found = listed(capsys)
    assert set(found) == set(SHIPPED)
    assert all(0 < len(re.sub(r" \[.*", "", text)) <= 130 for text in found.values())
    assert found["model/lrm_sd15.yaml"] == "LRM-SD1.5: the whole down path, mid block and text encoder train"
    assert found["data/pickapic_v1.yaml"] == "Pick-a-Pic v1, about 202 GB of parquet [PICKAPIC_ROOT]"


def test_one_kind(capsys) -> None:
    found = listed(capsys, "trainer")
    assert set(found) == {name for name in SHIPPED if name.startswith("trainer/")}


@pytest.mark.parametrize("name", ["model/lrm_sd15.yaml", "configs/recipes/ablations/lrm_loss_both.yaml"])
def test_one_file(name: str, capsys) -> None:
    main(["configs", name])
    assert capsys.readouterr().out == SHIPPED[name.removeprefix("configs/")].read_text()


def test_an_unknown_name_is_refused(capsys) -> None:
    line = refusal(capsys, "configs", "model/lrm_tinny.yaml")
    assert line == "name: no shipped file 'model/lrm_tinny.yaml'; did you mean 'model/lrm_tiny.yaml'?"
    assert "`latentreward configs` lists" in refusal(capsys, "fit", "--config=zzz.yaml")


def test_the_page_holds_the_list(capsys) -> None:
    main(["configs"])
    page = (ROOT / "docs" / "configs.md").read_text()
    (block,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert block == capsys.readouterr().out, "put what `latentreward configs` prints into docs/configs.md"
