"""Parsers of settings for subcommands that are plain functions.

Lightning is imported only by commands whose settings may name classes, because its import takes seconds.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from latentreward.core.errors import InputError, where
from latentreward.core.public_names import import_all, import_said
from latentreward.core.registry import MODULE_FOLDERS, backbone_names, find_modules_here
from latentreward.core.settings.errors import UNSET, check_ranges, leaves, summarise, unknown_setting_hint
from latentreward.core.settings.rewriting import (
    as_text,
    check_yaml,
    find_config,
    rewrite_arguments,
    rewrite_settings,
    with_paths,
)

MODE = "omegaconf+"
TRAINER_COMMAND = r"^(fit|validate|test|predict)\."
"""Subcommand that Lightning's command line puts before the name of each setting, as a regular expression."""
FLAGS = "{true,false", "\b[="  # starts of the metavars of options that need no value: flags, and ``--print_config``


class ConfigFile(ActionConfigFile):
    """Action of ``--config`` that also finds files installed with the package, and names the file in errors."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        if Path(path).is_file():
            text = Path(path).read_text(errors="replace")
            MODULE_FOLDERS.append(str(Path(path).resolve().parent))
            if all(re.fullmatch(r"\s*(#.*|---|\.\.\.)?", line) for line in text.splitlines()):
                return  # comments alone, which jsonargparse refuses
        try:
            super().__call__(parser, cfg, path, option_string)
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from error


VALIDATING = ContextVar("VALIDATING", default=False)
"""True while a parser validates: a parser of a nested class or section then skips the checks of the outer one."""


class SettingsParser(ArgumentParser):
    """Parser of settings with one-line errors that suggest the closest name.

    A null is checked against the setting's type like any other value. A flag without a value is true. In settings whose
    type is a path, ``~`` is expanded.
    """

    @override
    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        for action in self._actions:
            if str(action.metavar).startswith(FLAGS[0]):
                action.nargs, action.const = "?", True
        if args is not None and not self.exit_on_error:  # jsonargparse parses a class's own settings again, as texts
            args = [re.sub(r"=None$", "=null", argument) for argument in args]
        return super().parse_args(args, *more, **options)

    @override
    def format_help(self, *args: Any, **options: Any) -> str:
        """Return the help without the marks of Sphinx, in which docstrings are written, and with ``path`` as a type."""
        text = re.sub(r"Annotated\[str,\s+'path'\]", "path", super().format_help(*args, **options))
        text = re.sub(r"Optional\[path\]", "path | null", text)
        text = re.sub(r":\w+:`~?([^`]+)`", lambda role: re.sub(r"\n\s+", "", role[1]), text)  # it may break a long one
        return re.sub(r"``([^`]+)``", r"\1", text)

    @override
    def _check_value_key(self, action: Any, value: Any, *more: Any, **options: Any) -> Any:
        """Check a copy of a value, and that a group of settings, such as a dataclass's, is a mapping.

        Where a later file replaces a class, jsonargparse checks which settings of the earlier class the new one takes.
        This check changes its value: a dataclass inside, such as ``lora``, loses its ``class_path`` and ``init_args``.
        Merged with the later file's, which still has both, it would be neither form, and refused.
        """
        if type(action).__name__ == "_ActionConfigLoad" and not isinstance(value, str | dict | Namespace):
            raise TypeError(f'Parser key "{action.dest}": expected a mapping of settings, got {as_text(value)}')
        value = value.clone() if isinstance(value, Namespace) else value
        return super()._check_value_key(action, value, *more, **options)

    @override
    def validate(self, namespace: Namespace, *more: Any, **options: Any) -> None:
        for action in self._actions:
            if action.dest in namespace:
                namespace[action.dest] = with_paths(namespace[action.dest], getattr(action, "_typehint", None))
        if VALIDATING.get():
            super().validate(namespace, *more, **options)
            return
        token = VALIDATING.set(True)
        try:
            self._validate_command(namespace, *more, **options)
            if NULLS:
                set_parsing_settings(unset_sentinel=True)  # else jsonargparse accepts None for every type, as "not set"
                self._validate_command(namespace, *more, **{**options, "skip_required": True})
        finally:
            set_parsing_settings(unset_sentinel=False)
            VALIDATING.reset(token)

    def _validate_command(self, namespace: Namespace, *more: Any, **options: Any) -> None:
        """Validate a subcommand's settings in place; jsonargparse's own validation expands paths in copies alone.

        If validation fails, jsonargparse validates again, for its message about the subcommand.
        """
        command = namespace.get("subcommand")
        with suppress(Exception):  # super().validate raises the error again, with the subcommand's name
            self._subcommands_action._name_parser_map[command].validate(namespace[command], *more, **options)
            return
        super().validate(namespace, *more, **options)

    @override
    def dump(self, namespace: Namespace, *more: Any, **options: Any) -> str:
        return super().dump(namespace, *more, **{**options, "skip_validation": True})  # parsing has checked it

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        asked = getattr(ex, "subcommand_parser", self)
        names = (action.dest for action in asked._actions)
        message += unknown_setting_hint(
            message, [name for name in names if not re.search(r"(^|\.)(help|print_\w+)$", name)]
        )
        if not self.exit_on_error:  # parser of a nested class's arguments: its caller adds the setting's name
            super().error(message, ex)
        raise InputError(summarise(message) + where(ex)) from ex


def reworded(error: BaseException) -> str:
    """Return the message of the InputError among an error's causes; without one, its own in one line, with place."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or summarise(str(error)) + where(error))


@contextmanager
def settings_errors() -> Iterator[None]:
    """Convert errors of interpolations to InputError with a one-line message."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise InputError(summarise(str(error))) from error


@contextmanager
def constructor_errors() -> Iterator[None]:
    """Convert errors that constructors raise about their settings to InputError with a one-line message."""
    try:
        yield
    except Exception as error:  # Lightning's MisconfigurationException by its name: its import takes seconds
        known = isinstance(error, ValueError | ImportError | OSError)
        if not known and type(error).__name__ != "MisconfigurationException":
            raise
        raise InputError(reworded(error)) from error


NULLS: list[str] = []
"""Nulls among the settings, and interpolations that may resolve to null; validated a second time if there are any."""


def install_loader(short_names: Mapping[str, str], modules_here: bool) -> None:
    """Make jsonargparse check and rewrite every YAML text that it loads, see :func:`rewrite_settings`.

    ``modules_here`` says whether settings may name modules of the current folder and of those of ``--config`` files.
    """
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # jsonargparse registers this mode's own loader on first use
    load = getattr(get_loader(MODE), "__wrapped__", get_loader(MODE))

    @wraps(load)
    def load_rewritten(text: str) -> Any:
        check_yaml(text)
        settings = rewrite_settings(load(text), short_names)  # before it makes names relative
        NULLS.extend(re.findall(r"None|null|\$\{(?!oc\.env:)", repr(settings)))
        if modules_here:
            import_said(text)
            find_modules_here(value for _, value in leaves(settings))
        return settings

    set_loader(MODE, load_rewritten, exceptions=(yaml.YAMLError,))


def resolve_setting(key: str, *, _root_: DictConfig) -> Any:
    """Return a setting's value; resolver of ``${setting:fit.data.root}``, which :func:`rewrite_arguments` writes."""
    value = OmegaConf.select(_root_, key, default=_root_)
    if value is _root_:
        raise InputError(f"${{{re.sub(TRAINER_COMMAND, '', key)}}} {UNSET}")
    return value


def prepare_parsing(arguments: Sequence[str], classes: bool = False) -> None:
    """Set up jsonargparse and OmegaConf for parsing settings; to be called before any parser of settings is made.

    With ``classes``, settings may name this package's classes without their modules, and the user's own in modules of
    the current folder or beside the settings.
    """
    if classes:
        if any(re.fullmatch(r"-h|--(.+\.)?help(=.*)?", argument) for argument in arguments):
            import_all()  # help lists the classes that a setting takes
        import_said(" ".join(arguments))
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("setting", resolve_setting, replace=True)
    MODULE_FOLDERS[:] = [str(Path.cwd())]  # jsonargparse changes it as it reads a file
    NULLS[:] = [argument for argument in arguments if "null" in argument]
    install_loader(backbone_names(), classes)


def parse_function(
    function: Callable[..., None], command: str, settings: Sequence[str], bare: int = 1
) -> dict[str, Any]:
    """Parse the values of a function's typed arguments from ``--config`` files and the command line.

    Classes among the settings are instantiated in the order of the function's arguments. Values of the function's
    first ``bare`` arguments may be given without ``--NAME``, in this order.

    Returns:
        Argument name -> value.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    names = list(parameters)[:bare]
    shown = " ".join(f"[{name.upper()}]" for name in names)
    usage = f"latentreward {command} {shown} [--config FILE ...] [--SETTING=VALUE ...]"
    parser = SettingsParser(usage=usage, parser_mode=MODE, allow_abbrev=False, prog="latentreward", description=None)
    parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file; may be given several times.")
    parser.add_function_arguments(function, as_positional=False, fail_untyped=True)
    with settings_errors():
        settings = name_bare_values(settings, names, parser)
        config = parser.parse_args(rewrite_arguments(settings, backbone_names()))
    check_ranges(config)
    with constructor_errors():
        values = parser.instantiate(config)
    return {name: value for name, value in vars(values).items() if name != "config"}


def name_bare_values(arguments: Sequence[str], names: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Write arguments that are neither options nor values of options as ``--NAME=VALUE``.

    An argument after an option without ``=`` is the option's value; after a flag only if it is true or false. A name
    whose option is among the arguments is left out.
    """
    options = [argument.partition("=")[0] for argument in arguments]
    free = iter([name for name in names if f"--{name}" not in options])
    named: list[str] = []
    option = ""  # the option that the next argument may be a value of
    for argument in arguments:
        action = parser._option_string_actions.get(option)
        flag = str(getattr(action, "metavar", None)).startswith(FLAGS) or getattr(action, "nargs", None) == 0
        is_option = argument.startswith("-")
        is_value = option and (not flag or argument.lower() in ("true", "false"))
        name = None if is_option or is_value else next(free, None)
        named.append(argument if name is None else f"--{name}={argument}")
        option = argument if is_option and "=" not in argument else ""
    return named


def run_function(
    function: Callable[..., None], command: str, arguments: Sequence[str], bare: int = 1, classes: bool = True
) -> None:
    """Run a subcommand that is a plain function; its typed arguments are the settings, its docstring is the help.

    With ``classes``, settings may name this package's classes without their modules; otherwise none, and Lightning is
    not imported. See :func:`parse_function`.
    """
    prepare_parsing(arguments, classes)
    function(**parse_function(function, command, arguments, bare))
