"""What README and docs point at is there: files, headings, commands, config files."""

import re
from pathlib import Path

import pytest
import yaml

from latentreward.apps.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for place in ("*.md", "docs/**/*.md", "integrations/**/*.md") for path in sorted(ROOT.glob(place))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
CONFIG = re.compile(r"\bconfigs/[a-z0-9_/]+\.yaml")


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in LINK.findall(CODE.sub("", text)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.is_file(), f"{target}: no such file"
        assert not anchor or anchor in slugs(file.read_text()), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_configs_exist(page: Path) -> None:
    text = page.read_text()
    for block in SHELL.findall(text):
        for command in re.findall(r"^(?:\w+=\S+ )*latentreward ([a-z-]+)", block, flags=re.MULTILINE):
            assert command in COMMANDS, f"latentreward {command}"
    for name in CONFIG.findall(text):
        assert (ROOT / name).is_file(), name


def test_the_menu_of_the_site_has_every_page_in_few_groups() -> None:
    def pages(entries: list[str | dict[str, str | list]]) -> list[str]:
        values = [value for entry in entries for value in (entry.values() if isinstance(entry, dict) else [entry])]
        return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]

    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert len(menu) < 9  # docs/hooks/reference.py adds a group
    docs = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(menu)) == sorted(docs | {"changelog.md", "contributing.md"})
