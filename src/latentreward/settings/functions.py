"""Parsers of settings for subcommands that are one function; Lightning is loaded only where settings name classes."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from itertools import takewhile, zip_longest
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from latentreward.backbones.registry import backbone_names
from latentreward.errors import InputError
from latentreward.programs import allow_only, find_modules_here
from latentreward.settings.errors import CLASS_MODULES, UNSET, summarise, unknown_setting_hint
from latentreward.settings.library_messages import silence_libraries
from latentreward.settings.ranges import check_ranges, leaves
from latentreward.settings.rewriting import find_config, rewrite_arguments, rewrite_settings, show_secrets
from latentreward.settings.yaml_text import check_yaml

MODE = "omegaconf+"
TRUSTED = ("latentreward", "torch", "lightning", "torchmetrics")
UNTRUSTED = ("torch.hub", "torch.jit", "torch.ops", "torch.package", "torch.serialization", "torch.utils.cpp_extension")
"""Parts of trusted packages that run code from elsewhere."""
RESTRICTED: list[tuple[str, ...]] = []
"""The last entry holds the modules that ``--restrict-imports`` names; empty if it is not given."""
TRAINER_COMMAND = r"^(fit|validate|test|predict)\."
"""What Lightning's command line puts before the name of each setting."""


class ConfigFile(ActionConfigFile):
    """``--config``: also finds the files installed with the package, and names the file in its errors."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        try:
            super().__call__(parser, cfg, path, option_string)
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from error


VALIDATING = ContextVar("VALIDATING", default=False)
"""Whether a parser is inside the validation of another, whose class or section it reads."""


class SettingsParser(ArgumentParser):
    """Parser with one-line errors that suggest the closest name.

    Null is a value like any other, and a flag without a value is true.
    """

    @override
    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        for action in self._actions:
            if str(action.metavar).startswith("{true,false"):
                action.nargs, action.const = "?", True
        if args is not None and not self.exit_on_error:  # a class's own setting arrives as text made from its value
            args = [re.sub(r"=None$", "=null", argument) for argument in args]
        elif args is not None and self._subcommands_action is None:
            self._check_values(args)
        return super().parse_args(args, *more, **options)

    def _check_values(self, args: Sequence[str]) -> None:
        """Refuse a class's own setting that has no value: only the class knows which of them are flags."""
        for option, following in zip_longest(args, args[1:], fillvalue="--"):
            owner = re.fullmatch(r"(--\w+)(\.\w+)*\.(?!help$)\w+", option)
            inside = owner is not None and owner[1] in self._option_string_actions
            if inside and option not in self._option_string_actions and following.startswith("--"):
                raise InputError(f"{option} has no value; write {option}=VALUE, which is true or false for a flag")

    @override
    def validate(self, namespace: Namespace, *more: Any, **options: Any) -> None:
        if VALIDATING.get():
            super().validate(namespace, *more, **options)
            return
        check_functions(namespace)
        token = VALIDATING.set(True)
        try:
            self._validate_command(namespace, *more, **options)
            if NULLS:
                set_parsing_settings(unset_sentinel=True)  # else None is "not given" to jsonargparse: fits every type
                self._validate_command(namespace, *more, **{**options, "skip_required": True})
        finally:
            set_parsing_settings(unset_sentinel=False)
            VALIDATING.reset(token)

    def _validate_command(self, namespace: Namespace, *more: Any, **options: Any) -> None:
        """Validate a subcommand's settings once; jsonargparse would do so as a whole, and then one by one."""
        command = namespace.get("subcommand")
        with suppress(Exception):  # what is wrong is found again, and said of the subcommand
            self._subcommands_action._name_parser_map[command].validate(namespace[command], *more, **options)
            return
        super().validate(namespace, *more, **options)

    @override
    def dump(self, namespace: Namespace, *more: Any, **options: Any) -> str:
        text = super().dump(namespace, *more, **{**options, "skip_validation": True})  # parsing has checked it
        # With link targets it is jsonargparse's own copy, which OmegaConf reads: there the variable must not resolve.
        return show_secrets(text) if options.get("skip_link_targets", True) else text

    @override
    def instantiate(self, namespace: Namespace, *more: Any, **options: Any) -> Any:
        return super().instantiate(with_secrets(namespace), *more, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        asked = getattr(ex, "subcommand_parser", self)
        names = (action.dest for action in asked._actions)
        message += unknown_setting_hint(
            message, [name for name in names if not re.search(r"(^|\.)(help|print_\w+)$", name)]
        )
        if not self.exit_on_error:  # parser of a class's own settings: its caller adds where it was
            super().error(message, ex)
        raise InputError(summarise(message)) from ex


def with_secrets(value: Any, place: str = "") -> Any:
    """Copy settings with the values of the variables that only constructors may know, which stay out of saved files.

    Raises:
        InputError: If a variable is not set.
    """
    if isinstance(value, Namespace):
        return Namespace({name: with_secrets(item, f"{place}.{name}") for name, item in vars(value).items()})
    if isinstance(value, list):
        return [with_secrets(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str) or "${secret:" not in value:
        return value
    try:
        return OmegaConf.create([show_secrets(value)])[0]
    except OmegaConfBaseException as error:
        name = re.sub(TRAINER_COMMAND, "", place.removeprefix(".")).replace(".init_args", "")
        raise InputError(f"{name}: {summarise(str(error)).partition(': ')[2]}") from error


def input_error_behind(error: BaseException | None) -> str | None:
    """Message of our own error from which jsonargparse made ``error``, if it is one."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return None if error is None else str(error)


NULLS: list[str] = []
"""Nulls among the settings, and interpolations that may become some."""
STAND_INS: dict[str, str] = {}
"""Value in YAML that stands in for a variable of the environment -> the variable's name."""


@contextmanager
def naming_variables() -> Iterator[None]:
    """Name, in an error about a value that stood in for a variable which is not set, the variable too."""
    try:
        yield
    except InputError as error:
        for value, name in STAND_INS.items():
            if value in str(error) and name not in os.environ:
                raise InputError(f"{error}; or set the environment variable {name}") from error
        raise


def install_loader(short_names: Mapping[str, str], modules_here: bool) -> None:
    """Make jsonargparse pass every YAML text it loads through :func:`rewrite_settings`.

    Args:
        short_names: Of backbones.
        modules_here: Whether the text may name modules of the current folder.
    """
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # jsonargparse registers this mode's own loader on first use
    load = getattr(get_loader(MODE), "__wrapped__", get_loader(MODE))

    @wraps(load)
    def load_rewritten(text: str) -> Any:
        check_yaml(text)
        STAND_INS.update((value, name) for name, value in re.findall(r"\$\{oc\.env:(\w+),([^${}]+)\}", text))
        settings = rewrite_settings(load(text), short_names)
        NULLS.extend(re.findall(r"None|null|\$\{(?!oc\.env:)", repr(settings)))
        if modules_here:
            find_modules_here(value for _, value in leaves(settings))
        return settings

    set_loader(MODE, load_rewritten, exceptions=(yaml.YAMLError,))


def resolve_setting(key: str, *, _root_: DictConfig) -> Any:
    """OmegaConf resolver ``${setting:fit.data.root}``, which :func:`rewrite_arguments` writes."""
    value = OmegaConf.select(_root_, key, default=_root_)
    if value is _root_:
        raise InputError(f"${{{re.sub(TRAINER_COMMAND, '', key)}}} {UNSET}")
    return value


def kept_secret(*variable: Any) -> str:
    """OmegaConf resolver ``${secret:NAME,default}``, which :func:`hide_secrets` writes: stays what it is."""
    return f"${{secret:{','.join('null' if part is None else str(part) for part in variable)}}}"


def restrict_imports(modules: Sequence[str], programs: Sequence[str]) -> None:
    """Let settings name nothing but the modules we trust and ``modules``, and start no program but ``programs``.

    It holds for the rest of the process.
    """
    try:
        set_parsing_settings(import_path_denylist=["*", *UNTRUSTED], import_path_allowlist=[*TRUSTED, *modules])
    except ValueError as error:
        raise InputError(f"--restrict-imports={','.join(modules)}: {error}") from error
    RESTRICTED.append((*modules,))
    allow_only(programs)


def check_functions(settings: Any) -> None:
    """Under ``--restrict-imports``, refuse functions that it does not name and that are no registered backbones.

    The type of a setting says what a class is, but not what a function does: one that unpickles a file or imports a
    module would do for a setting that takes any callable.

    Raises:
        InputError: If there is one.
    """
    if not RESTRICTED:
        return
    allowed = tuple(f"{module}." for module in RESTRICTED[-1])
    for name, value in leaves(settings):
        place = re.sub(TRAINER_COMMAND, "", name).removesuffix("class_path").removesuffix(".")
        trusted = str(value).startswith(tuple(f"{module}." for module in TRUSTED))  # others are refused
        found = locate(value) if name.endswith("class_path") and trusted else value
        path = f"{found.__module__}.{found.__qualname__}" if inspect.isroutine(found) else ""
        if path and path not in backbone_names().values() and not f"{path}.".startswith(allowed):
            raise InputError(
                f"{place}: --restrict-imports does not allow the function {path!r}; if you trust it, say "
                f"--restrict-imports={path}"
            )


def values_of(option: str, arguments: Sequence[str]) -> list[str] | None:
    """Values of ``--OPTION=A,B`` in all its places together; None if it is nowhere."""
    given = [argument for argument in arguments if re.fullmatch(rf"{option}(=.*)?", argument)]
    return [name for text in given for name in text.partition("=")[2].split(",") if name] if given else None


def prepare_parsing(arguments: Sequence[str], classes: bool = False) -> list[str]:
    """What every parser of settings needs beforehand; returns the arguments without those that restrict it.

    Args:
        arguments: Of the command line.
        classes: Whether settings may name classes of the user's own, in modules of the current folder.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("setting", resolve_setting, replace=True)
    OmegaConf.register_resolver("secret", kept_secret, replace=True)
    modules, programs = values_of("--restrict-imports", arguments), values_of("--allow-programs", arguments)
    if modules is not None:
        restrict_imports(modules, programs or [])
    elif programs is not None:
        raise InputError("--allow-programs restricts nothing without --restrict-imports; give both")
    NULLS[:] = [argument for argument in arguments if "null" in argument]
    install_loader(backbone_names(), classes and (not RESTRICTED or bool(RESTRICTED[-1])))
    return [argument for argument in arguments if not re.match(r"--(restrict-imports|allow-programs)(=|$)", argument)]


def parse_function(
    function: Callable[..., None], command: str, settings: Sequence[str], bare: int = 1
) -> dict[str, Any]:
    """Values of a function's typed arguments, from ``--config`` files and from the command line.

    Up to ``bare`` leading arguments that are no options are the values of the function's first arguments. Classes among
    the settings are instantiated in the order of the function's arguments.

    Raises:
        InputError: If a setting, or what it leads to in a constructor, is wrong.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    names = list(parameters)[:bare]
    settings = list(settings)
    leading = takewhile(lambda pair: not pair[1].startswith("-"), zip(names, settings, strict=False))
    named = [f"--{name}={value}" for name, value in leading]
    settings[: len(named)] = named
    shown = " ".join(f"[{name.upper()}]" for name in names)
    usage = f"latentreward {command} {shown} [--config FILE ...] [--SETTING=VALUE ...]"
    parser = SettingsParser(usage=usage, parser_mode=MODE, allow_abbrev=False, prog="latentreward", description=None)
    parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file; may be given several times.")
    parser.add_function_arguments(function, as_positional=False, fail_untyped=True)
    try:
        config = parser.parse_args(rewrite_arguments(settings, backbone_names()))
    except OmegaConfBaseException as error:
        raise InputError(summarise(str(error))) from error
    check_ranges(config)
    try:
        values = parser.instantiate_classes(config)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(input_error_behind(error) or summarise(str(error))) from error
    return {name: value for name, value in vars(values).items() if name != "config"}


def run_plain_function(function: Callable[..., None], command: str, arguments: Sequence[str], bare: int = 1) -> None:
    """Run a subcommand none of whose settings is a class to be named, see :func:`parse_function`.

    Raises:
        InputError: If a setting is wrong.
    """
    settings = prepare_parsing(arguments)
    with naming_variables():
        function(**parse_function(function, command, settings, bare))


def import_class_modules() -> None:
    """Import our classes, so that settings may name them by their bare names."""
    importlib.import_module("latentreward.checkpoints.fsdp2")  # registers its short names
    for path in set(CLASS_MODULES.values()):
        module = importlib.import_module(path)
        for name in getattr(module, "__all__", ()):
            getattr(module, name)  # some packages load a class at its first use
    if Path("callbacks").resolve() in map(Path, sys.modules["latentreward.callbacks"].__path__):
        sys.modules.setdefault("callbacks", None)  # type: ignore[arg-type]  # in our own clone it would be a second copy


def prepare(arguments: Sequence[str]) -> list[str]:
    """Prepare parsing of settings that name classes, see :func:`prepare_parsing`: import ours, quieten libraries."""
    import_class_modules()
    silence_libraries()
    return prepare_parsing(arguments, classes=True)


def run_function(function: Callable[..., None], command: str, arguments: Sequence[str], bare: int = 1) -> None:
    """Run a subcommand that is a plain function: its typed arguments are the settings, its docstring their help.

    Its settings may name our classes by their bare names; see :func:`parse_function`.

    Raises:
        InputError: If a setting, or what it leads to in a constructor, is wrong.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    settings = prepare(arguments)
    try:
        values = parse_function(function, command, settings, bare)
    except MisconfigurationException as error:
        raise InputError(input_error_behind(error) or summarise(str(error))) from error
    with naming_variables():
        function(**values)
