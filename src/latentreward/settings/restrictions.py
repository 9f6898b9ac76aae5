"""Classes and functions that settings may name under ``--restrict-imports``."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pydoc import locate
from typing import Any, NewType, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from jsonargparse import Namespace, set_parsing_settings

from latentreward.backbones.registry import backbone_names
from latentreward.errors import InputError
from latentreward.programs import RESTRICTED, allow_only, within
from latentreward.settings.ranges import leaves

TRAINER_COMMAND = r"^(fit|validate|test|predict)\."
"""Subcommand that Lightning's command line puts before the name of each setting, as a regular expression."""
TRUSTED = ("latentreward", "torch", "lightning", "torchmetrics")
UNTRUSTED = ("torch.hub", "torch.jit", "torch.ops", "torch.package", "torch.serialization", "torch.utils.cpp_extension")
"""Modules of trusted packages that can run code from files or other packages; never allowed in settings."""
GENERAL = ("builtins", "collections", "collections.abc", "types", "typing")
"""Modules whose classes, such as object and Mapping, are no limit to what a setting takes."""


def restrict_imports(modules: Sequence[str], programs: Sequence[str]) -> None:
    """Restrict the modules that settings may name and the programs that may be started, for the rest of the process.

    ``modules`` are allowed beside :data:`TRUSTED`; programs are given by the absolute paths of their files.
    """
    try:
        set_parsing_settings(
            import_path_denylist=["*", *UNTRUSTED],
            import_path_allowlist=[*TRUSTED, *modules],
            instantiate_subclass_spec_in_any=bool(modules),  # check_classes refuses classes of other modules
        )
    except ValueError as error:
        raise InputError(f"--restrict-imports={','.join(modules)}: {error}") from error
    RESTRICTED.append((*modules,))
    allow_only(programs)


def refusal(what: str, path: str, where: str = "") -> InputError:
    """Return the error about a class or function that settings may not name."""
    remedy = f"if you trust it, say --restrict-imports={path}"
    return InputError(f"--restrict-imports does not allow {what} {path!r}{where}; {remedy}")


def check_functions(settings: Any) -> None:
    """Raise InputError under ``--restrict-imports`` for a function among the settings that is not allowed.

    Allowed are registered backbones, and functions in the modules that ``--restrict-imports`` names. A setting that
    takes any callable would also take a function that unpickles a file or imports a module.
    """
    if not RESTRICTED:
        return
    for name, value in leaves(settings):
        place = re.sub(TRAINER_COMMAND, "", name).removesuffix("class_path").removesuffix(".")
        trusted = within(str(value), TRUSTED)  # others are refused
        found = locate(value) if name.endswith("class_path") and trusted else value
        path = f"{found.__module__}.{found.__qualname__}" if inspect.isroutine(found) else ""
        if path and path not in backbone_names().values() and not within(path, RESTRICTED[-1]):
            raise InputError(f"{place}: {refusal('the function', path)}")


def check_classes(setting: str, kind: Any, default: Any, value: Any) -> None:
    """Raise InputError under ``--restrict-imports`` for a class in a setting whose type names no class around it.

    Settings of type ``Any``, ``dict[str, Any]`` or ``Callable`` would take any class of the trusted packages, some of
    which load libraries. The default is allowed.
    """
    if not RESTRICTED or repr(value) == repr(default):
        return
    limits = tuple(limits_of(kind))
    for path in paths_in(value):
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)  # parsing has imported what is allowed
        limited = inspect.isroutine(found) or (isinstance(found, type) and issubclass(found, limits))
        if not limited and not within(path, RESTRICTED[-1]):
            raise refusal("the class", path, f" in {setting}, whose type names no class around it")


def paths_in(value: Any) -> Iterator[str]:
    """Yield the import paths of the classes in a value, without those in the settings of such a class."""
    if isinstance(value, Namespace | Mapping):
        entries = vars(value) if isinstance(value, Namespace) else value
        if isinstance(path := entries.get("class_path"), str):
            yield path
            return
        value = list(entries.values())
    if isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        for item in value:
            yield from paths_in(item)


def limits_of(kind: Any) -> Iterator[type]:
    """Yield the classes that a type names, such as ``Module`` of ``dict[str, type[Module]] | None``."""
    if isinstance(kind, NewType):
        yield from limits_of(kind.__supertype__)
    elif isinstance(kind, TypeVar):
        yield from limits_of(kind.__bound__)
    elif is_typeddict(kind) or hasattr(kind, "_fields"):
        for inner in get_type_hints(kind).values():
            yield from limits_of(inner)
    elif get_args(kind):  # of a callable, the class that it returns
        for inner in get_args(kind)[1 if get_origin(kind) is Callable else 0 :]:
            yield from limits_of(inner)
    kind = get_origin(kind) or kind
    if isinstance(kind, type) and kind.__module__ not in GENERAL and not getattr(kind, "_is_protocol", False):
        yield kind
