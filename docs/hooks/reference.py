"""MkDocs hook that writes one page of reference for each room from its docstrings, without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

INDEX = """# Reference

One page for each room, written from its docstrings. Import classes and functions from the room, such as
`from latentreward.reward import ThurstoneLoss`; the headings name the files that define them. Imports between
rooms run one way ([Architecture](../architecture.md)).

| room | |
|---|---|
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages at the end of the navigation: a reader comes for a task first."""
    pages = [{name: f"api/{name}.md"} for name, _ in rooms(config)]
    config.nav.append({"Reference": ["api/index.md", *pages]})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages."""
    rows = []
    for name, folder in rooms(config):
        summary = first_line(folder / "__init__.py" if folder.is_dir() else folder)
        rows.append(f"| [`{name}`]({name}.md) | {summary} |\n")
        content = f"# latentreward.{name}\n\n{summary}\n\n" + "\n".join(sections(name, folder))
        files.append(File.generated(config, f"api/{name}.md", content=content))
    files.append(File.generated(config, "api/index.md", content=INDEX + "".join(rows)))
    return files


def rooms(config: MkDocsConfig) -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder, or file, of each room, by name."""
    root = Path(config.config_file_path).parent
    package = root / "src" / "latentreward"
    found = {path.stem: path for path in package.iterdir() if path.suffix == ".py" and not path.stem.startswith("_")}
    found |= {path.parent.name: path.parent for path in package.glob("*/__init__.py")}
    yield from sorted((found | {"callbacks": root / "callbacks"}).items())


def sections(name: str, folder: Path) -> Iterator[str]:
    """Markdown of each module that has something public."""
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
        if path.stem.startswith("_"):
            continue
        parts = [name, *path.relative_to(folder).with_suffix("").parts] if folder.is_dir() else [name]
        module = ".".join(parts)
        source = module if name == "callbacks" else f"latentreward.{module}"
        yield f"## latentreward.{module} {{ #{source} }}\n\n::: {source}\n"


def first_line(path: Path) -> str:
    """First line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
