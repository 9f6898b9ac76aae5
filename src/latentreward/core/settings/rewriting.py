"""Rewriting of settings before jsonargparse reads them: short names, added callbacks and packaged files.

These are plain functions on mappings and argument lists. They import neither torch nor Lightning.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from latentreward.core.errors import InputError, did_you_mean

LARGEST = 100_000  # largest number of values in one YAML text after its aliases are expanded
DEEPEST = 100  # largest number of levels of nested lists and mappings
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError, with the line, for a key that is given twice, and for too many values or levels.

    PyYAML silently keeps the last of two equal keys. Aliases let a short text of a stranger fill the memory.
    """
    left = iter(range(LARGEST))

    def visit(node: Any, level: int) -> None:
        line = node.start_mark.line + 1
        if level > DEEPEST or next(left, None) is None:
            raise yaml.YAMLError(f"line {line}: more than {LARGEST} values, or {DEEPEST} levels; write a smaller file")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: {key.value!r} is given twice; keep one of them")
                seen.add(key.value)
            for pair in node.value:
                for child in pair:
                    visit(child, level + 1)
        elif isinstance(node, yaml.SequenceNode):
            for child in node.value:
                visit(child, level + 1)

    if (root := yaml.compose(text, Loader=LOADER)) is not None:
        visit(root, 0)


SECTIONS = ("trainer", "nan_guard", "exact_resume", "graceful_stop", "performance", "predictions")
"""Sections of a trainer command's settings that are mappings of plain settings, without a ``class_path``."""

CLEARED: tuple[Any, ...] = (None, [])
"""Values of ``trainer.callbacks`` that drop all earlier callbacks; any other value adds callbacks."""

ABSOLUTE = re.compile(r"\$\{([a-zA-Z][\w.\[\]]*)\}")
"""An interpolation with the full name of a setting, e.g. ``${data.root}``; neither ``${.x}`` nor ``${oc.env:X}``."""

SECRET = re.compile(
    r"\$\{\s*oc\.env\s*:(?=\s*['\"]?(\w*(TOKEN|KEY|SECRET|PASS|PWD|CRED|AUTH|BEARER|JWT|COOKIE|SESSION|PRIVATE|WEBHOOK"
    r"|PAT(?![a-z]))|[^,}]*\$\{))",
    re.IGNORECASE,
)
"""Start of an interpolation of an environment variable whose value would be written into a config.yaml.

A variable whose name is an interpolation itself counts, because it could be any.
"""


PATH = "path"  # mark of an annotation such as :data:`~latentreward.core.contracts.PathText`: the text is a path


def without_secrets(text: str) -> str:
    """Return the text; raise InputError for a variable that looks like a secret, which each run would write down."""
    if found := SECRET.search(text):
        problem = f"{text[found.start() :][:60]} looks like a secret, which config.yaml would hold"
        raise InputError(f"{problem}; let the library or your class read the variable itself")
    return text


def expanded(path: str) -> str:
    """Expand ``~`` at the beginning of a path."""
    with suppress(RuntimeError):  # no such user
        path = str(Path(path).expanduser()) if path.startswith("~") else path
    return path


def with_paths(value: Any, kind: Any) -> Any:
    """Apply :func:`expanded` to what is a path by the type of a setting: the value, or items of a list or mapping.

    Paths are texts of type :data:`~latentreward.core.contracts.PathText`, and of any type that names ``Path``.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, str | Path):
        is_path = any(one is Path or PATH in getattr(one, "__metadata__", ()) for one in kinds)
        return type(value)(expanded(str(value))) if is_path else value
    # The last argument is the type of a mapping's values; tuple[X, ...] ends in an ellipsis.
    items = next((get_args(one)[-1 if isinstance(value, dict) else 0] for one in kinds if get_args(one)), None)
    if isinstance(value, dict):
        return {name: with_paths(one, items) for name, one in value.items()}
    return type(value)(with_paths(one, items) for one in value) if type(value) in (list, tuple) else value


def rewrite_settings(settings: Any, short_names: Mapping[str, str]) -> Any:
    """Rewrite the settings of one YAML text so that jsonargparse merges them with other files as documented.

    Short names of backbones become the dotted paths of their factories. ``trainer.callbacks`` becomes ``callbacks+``,
    so that a later file adds callbacks to those of earlier files; ``null`` and ``[]`` still drop earlier callbacks.
    Interpolations of secret variables are refused, see :func:`without_secrets`.
    """
    settings = _expand_short_names(settings, short_names)
    if isinstance(settings, dict) and "trainer" in settings:
        trainer = settings["trainer"]
        if isinstance(trainer, str):
            raise InputError(f"trainer: {trainer!r} must be a mapping; give the file itself as --config")
        if isinstance(trainer, dict) and "callbacks" in trainer and trainer["callbacks"] not in CLEARED:
            plain = trainer["callbacks"]
            if plain == {}:
                raise InputError("trainer.callbacks: {} names no callback; give a class_path")
            callbacks = [*(plain if isinstance(plain, list) else [plain]), *trainer.get("callbacks+", [])]
            others = {key: value for key, value in trainer.items() if key != "callbacks"}
            settings = {**settings, "trainer": others | {"callbacks+": callbacks}}
    for section in SECTIONS if isinstance(settings, dict) else ():
        if not isinstance(given := settings.get(section, {}), dict):  # jsonargparse would silently drop other values
            raise InputError(f"{section}: expected a mapping of settings, got {as_text(given)}; set {section}.NAME")
    return settings


def _expand_short_names(node: Any, short_names: Mapping[str, str], place: str = "") -> Any:
    if isinstance(node, list):
        return [_expand_short_names(item, short_names, f"{place[:-1]}[{index}].") for index, item in enumerate(node)]
    if isinstance(node, str):
        return without_secrets(node)
    if not isinstance(node, dict):
        return node
    if not isinstance(name := node.get("class_path", "x"), str) or not name:
        raise InputError(f"{place}class_path: expected the name of a class, got {as_text(name)}")
    if not isinstance(given := node.get("init_args", {}), dict):
        raise InputError(f"{place}init_args: expected a mapping of settings, got {as_text(given)}")
    return {
        key: short_names.get(value, value)
        if key in ("class_path", "backbone") and isinstance(value, str)
        else _expand_short_names(value, short_names, f"{place}{key}.")
        for key, value in node.items()
    }


def as_text(value: Any) -> str:
    """Format a value as in YAML, on one line."""
    return json.dumps(value, default=str)


def rewrite_arguments(arguments: Sequence[str], short_names: Mapping[str, str], root: str = "") -> list[str]:
    """Rewrite command-line options like :func:`rewrite_settings`: ``--model.backbone sd15``, ``--trainer.callbacks X``.

    Option and value may be separated by a blank or ``=``. Interpolations such as ``${data.root}`` become
    ``${setting:fit.data.root}``, because jsonargparse keeps a trainer command's settings under the subcommand, and
    would look up a plain name relative to the class whose argument contains it. ``root`` comes before setting names in
    interpolations: the subcommand with a dot, such as ``fit.``, or nothing.
    """
    rewritten: list[str] = []
    arguments = [ABSOLUTE.sub(rf"${{setting:{root}\1}}", without_secrets(argument)) for argument in arguments]
    while arguments:
        argument = arguments.pop(0)
        option, equals, value = argument.partition("=")
        if not re.fullmatch(rf"--({'|'.join(SECTIONS)}|trainer\.callbacks|(.+\.)?backbone(\.class_path)?)", option):
            rewritten.append(argument)
            continue
        if not equals and arguments and not arguments[0].startswith("--"):
            equals, value = "=", arguments.pop(0)
        if option == "--trainer":
            raise InputError(f"--trainer {value}: set --trainer.NAME=VALUE, or give a file as --config")
        if option[2:] in SECTIONS and not value.startswith("{") and not Path(value).is_file():
            raise InputError(f"{option} {value}: expected a mapping of settings; set {option}.NAME=VALUE")
        if option == "--trainer.callbacks" and value not in ("null", "[]"):
            option += "+"
        rewritten.append(option + equals + short_names.get(value, value))
    return rewritten


def find_config(name: str) -> str:
    """Resolve the value of ``--config`` to a path that can be read; raises InputError if there is no such file.

    A URL or a YAML text is returned unchanged. ``configs/...`` may also name a file that was installed with the
    package; a file in the current folder has priority.
    """
    if any(mark in name for mark in (":", "{", "\n")):
        return name
    if Path(name := expanded(name)).is_file():
        return name
    ours = {f"configs/{one}": path for one, path in shipped_configs().items()}
    if name in ours:
        return str(ours[name])
    reason = "is a folder" if Path(name).is_dir() else "does not exist"
    hint = did_you_mean(name, ours) or "; `latentreward configs` lists the files that come with the package"
    raise InputError(f"--config {name} {reason}{hint}")


def shipped_configs() -> dict[str, Path]:
    """Find the YAML files installed with the package: name, e.g. ``model/lrm_sd15.yaml`` -> path."""
    packaged = Path(import_module("latentreward.configs").__path__[0])
    return {path.relative_to(packaged).as_posix(): path for path in sorted(packaged.rglob("*.yaml"))}
