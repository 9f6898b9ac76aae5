"""Rewording of jsonargparse's and OmegaConf's messages to one line: setting, problem and remedy.

The original messages list all alternatives of a type over many lines. An unknown message keeps its words, on one line.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pydoc import locate
from textwrap import dedent
from typing import Any

from jsonargparse import Namespace

from latentreward.core.errors import LIGHTNING_NO_GPU, NO_GPU, SEARCHED, InputError, did_you_mean, lacks, quoted
from latentreward.core.public_names import public_names
from latentreward.core.registry import backbone_names, of_framework

WRAPPERS = (
    r'Parser key "(?P<key>[^"]+)"[^:\n]*:(?P<inner>.*)',
    r"Problem with given class_path '[^']+':(?P<inner>.*)",
    r"- Expected a path but .*? either not accessible or invalid\n- (?P<inner>.*)",
    r"Type .*? expects a function or a callable class: (?P<inner>.*)\. Got value: .*",
    r"(?P<inner>Not a valid subclass of .*?)\nSubclass types expect one of:.*",
    r"Problems parsing config: (?P<inner>.*)",
)
UNION = (
    r"Does not validate against any of the Union subtypes\nSubtypes: \[(?P<types>.*?)\]\nErrors:\n(?P<errors>.*)"
    r"\nGiven value type: [^\n]*\nGiven value: ?(?P<value>.*)"
)
MISMATCH = ("Expected a <", "Expected a typing", "Not a valid subclass")  # starts of errors of a Union's alternatives
INTERPOLATED = r" full_key: (?:(?:fit|validate|test|predict)\.)?(\S+).*"
"""End of OmegaConf's messages, with the setting's name, which follows the subcommand for a trainer's settings."""
UNKNOWN_SETTING = re.compile(
    r"(?:Subcommand '\w+' does not accept option|Option) '(?P<key>.+?)'|unrecognized arguments: --(?P<option>[^=\s]+)"
)
UNSET = "is not set; name a setting in full, e.g. ${data.init_args.batch_size}, or a variable, ${oc.env:NAME}"
"""Message about an interpolation of a setting or variable that does not exist."""
WORDS = {"NoneType": "null", "Sequence": "list", "Iterable": "list", "tuple": "list"}
"""Name of a Python type -> its name in YAML, if the two differ."""
LIBRARIES = {"logger": "lightning.pytorch.loggers", "optimizer": "torch.optim"}
"""Last part of a setting's dotted name -> module of a library with its classes."""


def summarise(message: str) -> str:
    """Reword a message of jsonargparse or OmegaConf to one line."""
    keys, text = [], dedent(message).strip()
    while wrapper := next(filter(None, (re.fullmatch(one, text, re.DOTALL) for one in (*WRAPPERS, UNION))), None):
        parts = wrapper.groupdict()
        keys += [parts["key"]] if "key" in parts else []
        text = dedent(_telling_alternative(**parts) if "errors" in parts else parts["inner"]).strip()
    text, *key = re.split(INTERPOLATED, " ".join(text.split()), maxsplit=1)
    setting = ".".join([*keys, *key[:1]])
    for pattern, reword in REWORDINGS.items():
        if match := re.match(pattern, text):
            text = match.expand(reword) if isinstance(reword, str) else reword(match, setting)
            break
    return f"{setting}: {text}" if setting else text


def unknown_setting_hint(message: str, settings: Iterable[str]) -> str:
    """Suggest a setting for a message about an unknown setting; empty for any other message."""
    if re.match(r"unrecognized arguments: [^-]\S*\.ya?ml\b", message):
        return "; give each file as --config FILE"
    match = UNKNOWN_SETTING.match(message)
    if match is None or "did you mean" in message:
        return ""
    name, settings = match["key"] or match["option"], set(settings)
    group, groups = name.partition(".")[0], {setting.partition(".")[0] for setting in settings}
    return did_you_mean(name, settings) if group in groups else did_you_mean(group, groups)


def _telling_alternative(types: str, errors: str, value: str) -> str:
    """Return the first error of a Union's alternatives that is not a mere type mismatch; else all types, for one."""
    if "torch.Tensor" in types:  # a learning rate's, which settings give as a number
        return f"Expected a <class 'float'>. Got value: {value}"
    alternatives = re.split(r"^  - ", errors, flags=re.MULTILINE)[1:]
    for text in (re.sub(r"^ {4}", "", one, flags=re.MULTILINE) for one in alternatives):
        of_item = "Got value: " in text and not text.endswith(f"Got value: {value}")
        if of_item or not text.startswith(MISMATCH):
            name = re.match(r"(?:\{'class_path': ')?([\w.]+)", value)
            shown = rf"\1 {name[1]}" if name else r"\1"
            return re.sub(r"^(Import path|Expected .* but)(?= does not| is abstract)", shown, text)
    return f"Expected a {types}. Got value: {value}"


def _wrong_type(match: re.Match[str], setting: str) -> str:
    classes = re.findall(r"<class '(?:\w+\.)*(\w+)'>|\b(list|dict|tuple|Iterable|Sequence)\[", match["types"])
    literals = re.findall(r"'([\w-]+)'(?=[,\]])", match["types"])
    names = [WORDS.get(first or second, first or second) for first, second in classes]
    wanted = " or ".join(dict.fromkeys(names + literals)) or match["types"]
    if match["value"] == "None":
        return f"expected {wanted}, got null; give a value, or leave the setting out for its default"
    hint = did_you_mean(match["value"], literals)
    return f"expected {wanted}, got {quoted(match['value'])!r}{hint if 'did you mean' in hint else ''}"


def names_for(setting: str) -> list[str]:
    """Return the names of backbones, of a library's classes, or of ours, by what a setting takes."""
    last = setting.rpartition(".")[2]
    if last == "backbone":
        return list(backbone_names())
    names = dir(sys.modules[LIBRARIES[last]]) if LIBRARIES.get(last) in sys.modules else public_names()
    return [name for name in names if name[0].isupper()]


def _unknown_name(match: re.Match[str], setting: str) -> str:
    names = names_for(setting)
    if match[1] in names:  # ours, but of another kind than this setting takes
        return f"{match[1]} is no class that this setting takes; its documentation names those that fit"
    return f"unknown name {match[1]!r}{did_you_mean(match[1], names)}"


def _abstract(match: re.Match[str], setting: str) -> str:
    cls: type = locate(match[1])  # type: ignore[assignment]  # jsonargparse has imported the class
    return f"its class is not given; say --{setting} CLASS too" if of_framework(match[1]) else lacks(cls)


def _missing(match: re.Match[str], setting: str) -> str:
    choices = did_you_mean("", backbone_names()) if match[1] == "backbone" else ""
    return f"{match[1]} is missing; give it in a --config file or as --{setting}{setting and '.'}{match[1]}{choices}"


REWORDINGS: dict[str, str | Callable[[re.Match[str], str], str]] = {
    r"Expected an? (?P<types>.+)\. Got value: (?P<value>.*)": _wrong_type,
    r"(?:Expected a dot import path string|Unexpected import path format): (\S+)": _unknown_name,
    r"Expected an import path or a subclass spec, but got (.*)": lambda match, setting: (
        f"expected the name of a class, got {'null' if match[1] == 'None' else match[1]}"
        f"{did_you_mean('', names_for(setting))}"
    ),
    r"the following arguments are required: (?:\w+\.)?([^\s,]+)": _missing,
    r"Expected an instantiatable class, but (\S+) is abstract": _abstract,
    r"(No module named '[\w.]+')$": rf"\1 {SEARCHED}",
    r"Interpolation key '(?:.+' not found \(resolved to '\w+\.)?(.+?)'": rf"${{\1}} {UNSET}",
    r"KeyError raised while resolving interpolation: .Environment variable '(\w+)'": (
        r"the environment variable \1 is not set; say \1=VALUE latentreward ..., or export it"
    ),
    "no viable alternative at input|token recognition error|mismatched input|missing": (
        "the interpolation is not closed; write ${NAME}, ${oc.env:VARIABLE}, or a value"
    ),
    r"Recursive interpolation detected|extraneous input '}' expecting": (
        "the interpolation refers to itself; write a value"
    ),
    r"InputError raised while resolving interpolation: (.*)": r"\1",
    LIGHTNING_NO_GPU: NO_GPU,
}
"""Regular expression for a message's start -> new text, or a function of the match and the setting that returns it."""

POSITIVE = (
    " batch_size decode_batch_size train_pairs val_pairs batches_per_epoch flush_every images_per_shard gallery_images "
    "max_pixels images_per_prompt best_of cards num_prompts parts decode_threads limit_train_batches "
)
"""Last parts of the names of numbers that must be positive, where no constructor or library says so."""


def check_ranges(settings: Any) -> None:
    """Raise InputError if a number among the settings is not finite, or not positive though it must be."""
    for name, value in leaves(settings):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise InputError(f"{name}: {value} is not finite; give a finite number")
        if value <= 0 and f" {name.rpartition('.')[2]} " in POSITIVE:
            raise InputError(f"{name}: {value} must be > 0; give such a number")


def leaves(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through nested settings; yield (name as on the command line, value) for every value that is not nested."""
    if isinstance(settings, list | tuple):
        for index, item in enumerate(settings):
            yield from leaves(item, f"{place}[{index}]")
    elif isinstance(settings, Mapping | Namespace) and settings != {}:
        for name, value in (settings if isinstance(settings, Mapping) else vars(settings)).items():
            nested = name == "init_args" and isinstance(value, Mapping | Namespace)
            yield from leaves(value, place if nested else f"{place}.{name}".strip("."))
    else:
        yield place, settings
