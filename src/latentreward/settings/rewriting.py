"""What happens to settings before jsonargparse reads them: short names, callbacks that add up, packaged files.

Plain functions on mappings and argument lists; nothing here imports torch or Lightning.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from latentreward.errors import InputError, did_you_mean

SECTIONS = ("trainer", "nan_guard", "exact_resume", "graceful_stop", "predictions")
"""Sections of a trainer's settings that are no class to be named."""

CLEARED: tuple[Any, ...] = (None, [])
"""Values of ``trainer.callbacks`` that drop earlier callbacks instead of adding to them."""

ABSOLUTE = re.compile(r"\$\{([a-zA-Z][\w.\[\]]*)\}")
"""An interpolation that names a setting from the top: neither ``${.x}`` nor ``${oc.env:X}``."""

SECRET = re.compile(r"\$\{\s*oc\.env\s*:(?=\s*['\"]?\w*(TOKEN|KEY|SECRET|PASSWORD))")
"""Begins a variable of the environment whose value must not be written into a config.yaml."""


def hide_secrets(text: str) -> str:
    """Rename interpolations of secret variables, so that OmegaConf leaves them as they are."""
    return SECRET.sub("${secret:", text)


def show_secrets(text: str) -> str:
    """Undo :func:`hide_secrets`: ``${oc.env:NAME}``, as the user's file has it."""
    return text.replace("${secret:", "${oc.env:")


def rewrite_settings(settings: Any, short_names: Mapping[str, str]) -> Any:
    """Bring one loaded YAML mapping into the form jsonargparse merges the way we promise.

    Short names of backbones become the dotted paths of their factories, and a plain ``trainer.callbacks`` becomes
    ``callbacks+``, so that stacked files add callbacks; ``null`` and ``[]`` still clear them.

    Args:
        settings: Whatever the YAML held; returned unchanged unless it is a mapping or a list.
        short_names: Short name -> dotted path.

    Raises:
        InputError: If ``trainer`` names a file, whose callbacks would replace the earlier ones.
    """
    settings = _expand_short_names(settings, short_names)
    if isinstance(settings, dict) and "trainer" in settings:
        settings = {**settings, "trainer": _append_callbacks(settings["trainer"])}
    for section in SECTIONS if isinstance(settings, dict) else ():
        if not isinstance(given := settings.get(section, {}), dict):  # jsonargparse drops anything else
            raise InputError(f"{section}: expected a mapping of settings, got {as_text(given)}; set {section}.NAME")
    return settings


def _expand_short_names(node: Any, short_names: Mapping[str, str], place: str = "") -> Any:
    if isinstance(node, list):
        if {} in node:  # jsonargparse takes an empty mapping for no class at all
            raise InputError(f"{place[:-1]}: {{}} in a list names nothing; give a class_path or a value")
        return [_expand_short_names(item, short_names, f"{place[:-1]}[{index}].") for index, item in enumerate(node)]
    if isinstance(node, str):
        return hide_secrets(node)
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
    """Write a value as YAML has it, on one line."""
    return json.dumps(value, default=str)


def _append_callbacks(trainer: Any) -> Any:
    if isinstance(trainer, str):
        raise InputError(f"trainer: {trainer!r} must be a mapping; give the file itself as --config")
    if not isinstance(trainer, dict) or "callbacks" not in trainer or trainer["callbacks"] in CLEARED:
        return trainer
    plain = trainer["callbacks"]
    if plain == {}:
        raise InputError("trainer.callbacks: {} names no callback; give a class_path")
    callbacks = [*(plain if isinstance(plain, list) else [plain]), *trainer.get("callbacks+", [])]
    return {key: value for key, value in trainer.items() if key != "callbacks"} | {"callbacks+": callbacks}


def rewrite_arguments(arguments: Sequence[str], short_names: Mapping[str, str], root: str = "") -> list[str]:
    """The same for options: ``--model.backbone sd15`` and ``--trainer.callbacks X``, with a blank or an ``=``.

    Interpolations such as ``${data.root}`` become ``${setting:fit.data.root}``: jsonargparse keeps a trainer's
    settings under the subcommand (``root``), and would take a plain name as relative to the class whose argument it is.

    Raises:
        InputError: For ``--trainer FILE``, whose callbacks would replace the earlier ones.
    """
    rewritten: list[str] = []
    arguments = list(arguments)
    while arguments:
        argument = ABSOLUTE.sub(rf"${{setting:{root}\1}}", hide_secrets(arguments.pop(0)))
        option, equals, value = argument.partition("=")
        if not re.fullmatch(r"--(trainer(\.callbacks)?|(.+\.)?backbone(\.class_path)?)", option):
            rewritten.append(argument)
            continue
        if not equals and arguments and not arguments[0].startswith("--"):
            equals, value = "=", ABSOLUTE.sub(rf"${{setting:{root}\1}}", hide_secrets(arguments.pop(0)))
        if option == "--trainer":
            raise InputError(f"--trainer {value}: set --trainer.NAME=VALUE, or give a file as --config")
        if option == "--trainer.callbacks" and value not in ("null", "[]"):
            option += "+"
        rewritten.append(option + equals + short_names.get(value, value))
    return rewritten


def find_config(name: str) -> str:
    """Path of a ``--config`` value.

    Args:
        name: A file, a URL, or YAML text; ``configs/...`` may also name a file that was installed with the package.

    Raises:
        InputError: If there is no such file.
    """
    if Path(name).is_file() or any(mark in name for mark in (":", "{", "\n")):
        return name
    ours = {f"configs/{one}": path for one, path in shipped_configs().items()}
    if name in ours:
        return str(ours[name])
    reason = "is a folder" if Path(name).is_dir() else "does not exist"
    hint = did_you_mean(name, ours) or "; `latentreward configs` lists the files that come with the package"
    raise InputError(f"--config {name} {reason}{hint}")


def shipped_configs() -> dict[str, Path]:
    """Find the YAML files that come with the package: name such as ``model/lrm_sd15.yaml`` -> file."""
    packaged = Path(import_module("latentreward.configs").__path__[0])
    return {path.relative_to(packaged).as_posix(): path for path in sorted(packaged.rglob("*.yaml"))}
