"""Rewording of jsonargparse's and OmegaConf's messages to one line: setting, problem and remedy.

The original messages list all alternatives of a type over many lines. An unknown message keeps its words, on one line.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pydoc import locate
from textwrap import dedent
from typing import Any

from jsonargparse import Namespace

from latentreward.core.errors import LIGHTNING_NO_GPU, NO_GPU, SEARCHED, InputError, did_you_mean, lacks
from latentreward.core.public_names import import_all, public_names
from latentreward.core.registry import backbone_names

PARTS = {
    ".modules.": "model",
    ".heads.": "head",
    ".losses.": "loss",
    ".remote.": "schema",
    ".rewards.": "reward rewards",
    ".noise.": "levels",
    "latentreward.data.": "data images train val test predict reader",
    ".scorers.": "scorer scorers held_out",
    ".benchmark.": "benchmarks",
    ".rollout.": "selection",
    ".callbacks.": "callbacks",
}
"""Part of the dotted names of modules -> last parts of the dotted names of settings whose values are classes there."""
PART_OF = {name: part for part, names in PARTS.items() for name in names.split()} | {
    "encoder": "latentreward.diffusion.cache.sources",
    "logger": "lightning.pytorch.loggers",
    "optimizer": "torch.optim",
}
"""Last part of a setting's dotted name -> part of the names of modules with its classes, or one module."""

WRAPPERS = (
    r'Parser key "(?P<key>[^"]+)"[^:\n]*:(?P<inner>.*)',
    r"Problem with given class_path '(?P<kind>[^']+)':(?P<inner>.*)",
    r"- Expected a path but .*? either not accessible or invalid\n- (?P<inner>.*)",
    r"Type .*? expects a function or a callable class: (?P<inner>.*)\. Got value: .*",
    r"(?P<inner>Not a valid subclass of .*?)\nSubclass types expect one of:.*",
    r"Problems parsing config: (?P<inner>.*)",
)
UNION = (
    r"Does not validate against any of the Union subtypes\nSubtypes: \[(?P<types>.*?)\]\nErrors:\n(?P<errors>.*)"
    r"\nGiven value type: [^\n]*\nGiven value: ?(?P<value>.*)"
)
UNKNOWN_SETTING = re.compile(
    r"(?:Subcommand '\w+' does not accept option|Option) '(?P<key>.+?)'|unrecognized arguments: --(?P<option>[^=\s]+)"
)

MISSING = r"the following arguments are required: (?:\w+\.)?([^\s,]+)"  # start of the message about a missing setting
INTERPOLATED = r" full_key: (?:(?:fit|validate|test|predict)\.)?(\S+).*"
"""End of OmegaConf's messages, with the setting's name, which follows the subcommand for a trainer's settings."""
UNSET = "is not set; name a setting in full, e.g. ${data.init_args.batch_size}, or a variable, ${oc.env:NAME}"
"""Message about an interpolation of a setting or variable that does not exist."""
WORDS = {"NoneType": "null", "Sequence": "list", "Iterable": "list", "tuple": "list"}
"""Name of a Python type -> its name in YAML, if the two differ."""
LIGHTNING_BASES = ("lightning.LightningModule", "lightning.LightningDataModule")
"""Classes that jsonargparse takes for settings of a model, or of data, whose class is not named yet."""
LONGEST_VALUE = 200  # largest number of characters of a wrong value that a message repeats
NUMBER_OR_TENSOR = "<class 'float'>, <class 'torch.Tensor'>"
"""Types of an optimiser's learning rate in jsonargparse's messages; settings give it as a number."""
NAMED_IN: dict[str, str] = {}  # environment variable -> config file that refers to it; filled as the files are read


def summarise(message: str) -> str:
    """Reword a message of jsonargparse or OmegaConf to one line."""
    keys, kind, text = [], "", dedent(message).strip()
    while wrapper := next(filter(None, (re.fullmatch(one, text, re.DOTALL) for one in (*WRAPPERS, UNION))), None):
        parts = wrapper.groupdict()
        keys += [parts["key"]] if "key" in parts else []
        kind = parts.get("kind", kind)
        text = dedent(_telling_alternative(wrapper) if "errors" in parts else parts["inner"]).strip()
    text, *key = re.split(INTERPOLATED, " ".join(text.split()), maxsplit=1)
    setting = ".".join([*keys, *key[:1]])
    if (missing := re.match(MISSING, text)) and (place := _in_list(message, keys[-1:], kind, missing[1])):
        return f"{setting}{place}: {missing[1]} is missing; write it under the init_args of this class"
    for pattern, reword in REWORDINGS.items():
        if match := re.match(pattern, text):
            text = match.expand(reword) if isinstance(reword, str) else reword(match, setting)
            break
    else:
        if kind in LIGHTNING_BASES and text.startswith("Option '"):
            text += f", since no file before this one names a class; give the one with {setting}.class_path first"
        elif kind in LIGHTNING_BASES and text.startswith("unrecognized arguments: "):
            text += f", since nothing before it names a class; give --config or --{setting} CLASS first"
    return f"{setting}: {text}" if setting else text


def unknown_setting_hint(message: str, settings: Iterable[str]) -> str:
    """Suggest a setting for a message about an unknown setting; empty for any other message."""
    match = UNKNOWN_SETTING.match(message)
    if match is None or "did you mean" in message:
        return ""
    name, settings = match["key"] or match["option"], set(settings)
    group, groups = name.partition(".")[0], {setting.partition(".")[0] for setting in settings}
    return did_you_mean(name, settings) if group in groups else did_you_mean(group, groups)


def _telling_alternative(union: re.Match[str]) -> str:
    """Return the first error of a Union's alternatives that is not a mere type mismatch.

    If all are type mismatches, the result is one sentence with all types.
    """
    if union["types"] == NUMBER_OR_TENSOR:  # else the message would be about the import path of a tensor
        return f"Expected a <class 'float'>. Got value: {union['value']}"
    alternatives = re.split(r"^  - ", union["errors"], flags=re.MULTILINE)[1:]
    alternatives = [re.sub(r"^ {4}", "", alternative, flags=re.MULTILINE) for alternative in alternatives]
    mismatch = ("Expected a <", "Expected a typing", "Not a valid subclass")
    telling = [
        alternative
        for alternative in alternatives
        if not alternative.startswith(mismatch)
        or ("Got value: " in alternative and not alternative.endswith(f"Got value: {union['value']}"))  # of an item
    ]
    if not telling:
        return f"Expected a {union['types']}. Got value: {union['value']}"
    name = re.match(r"(?:\{'class_path': ')?([\w.]+)", union["value"])
    if not name:
        return telling[0]
    return re.sub(r"^(Import path|Expected .* but)(?= does not| is abstract)", rf"\1 {name[1]}", telling[0])


def _wrong_type(match: re.Match[str], setting: str) -> str:
    classes = re.findall(r"<class '(?:\w+\.)*(\w+)'>|\b(list|dict|tuple|Iterable|Sequence)\[", match["types"])
    literals = re.findall(r"'([\w-]+)'(?=[,\]])", match["types"])
    names = [WORDS.get(first or second, first or second) for first, second in classes]
    wanted = list(dict.fromkeys(names + literals)) or [match["types"]]
    listed = " or ".join(wanted) if len(wanted) < 4 else f"one of {', '.join(wanted)}"
    if match["value"] == "None":
        return f"expected {listed}, got null; give a value, or leave the setting out for its default"
    if nested := re.fullmatch(r"NestedArg\(key='(.+?)', val=(.*)\)", match["value"]):
        return f"expected {listed}, which has no setting {nested[1]}, got {setting}.{nested[1]}={nested[2]}"
    hint = did_you_mean(match["value"], literals)
    shown = match["value"] if len(match["value"]) <= LONGEST_VALUE else f"{match['value'][:LONGEST_VALUE]}…"
    if set(wanted) <= {"list", "null"} and re.fullmatch(r"[\w./:-]+", match["value"]):
        hint += f"; did you mean [{match['value']}]?"
    return f"expected {listed}, got {shown!r}{hint if 'did you mean' in hint else ''}"


def names_for(setting: str) -> list[str]:
    """Return the names of our classes, or backbones, that a setting accepts; empty if it accepts none of them."""
    last = setting.rpartition(".")[2]
    if last == "backbone":
        return list(backbone_names())
    part = PART_OF.get(last, "-")
    if part in sys.modules:  # of a library
        return [name for name in dir(sys.modules[part]) if name[0].isupper()]
    return [name for name, module in public_names().items() if part in f"{module}." and name[0].isupper()]


def _unknown_name(match: re.Match[str], setting: str) -> str:
    names = names_for(setting)
    if match[1] in names:  # ours, but of another kind than this setting takes
        return f"{match[1]} is no class that this setting takes; its documentation names those that fit"
    return f"unknown name {match[1]!r}{did_you_mean(match[1], names)}"


def _not_a_subclass(match: re.Match[str], setting: str) -> str:
    path, kind = match.groups()
    module, _, name = path.rpartition(".")
    if not inspect.isroutine(getattr(sys.modules.get(module), name, None)):
        return match[0]
    return f"the function {path!r} does not state that it returns {kind}; write def {name}(...) -> {kind}"


def _help_of_unknown_class(match: re.Match[str], setting: str) -> str:
    if not setting:  # no setting has this name
        return match[0]
    option = f"--{setting}.{match[1]}help {match[2]}"
    return f"the class is not known yet; say --{setting} CLASS {option}, or give a --config file before it"


def _in_list(message: str, key: Sequence[str], kind: str, name: str) -> str:
    """Return index and class of the item of a list of classes that lacks a setting; empty outside a list.

    ``key`` is the last part of the list's dotted name, ``kind`` the item's class path, ``name`` the setting's name.
    """
    begin = re.search(rf"(?:Given value: |\b{''.join(key).rpartition('.')[2]}=)\[(?=Namespace)", message)
    item = rf"class_path='{re.escape(kind)}', init_args=Namespace\((?:[^()]|\([^()]*\))*?\b{name}=None"
    found = begin and re.compile(item).search(message, begin.end())
    if begin is None or not found:
        return ""
    depth = index = 0
    for character in message[begin.end() : found.start()]:
        depth += (character in "([{") - (character in ")]}")
        index += character == "," and not depth
    return f"[{index}] ({kind})"


def _abstract(match: re.Match[str], setting: str) -> str:
    cls: type = locate(match[1])  # type: ignore[assignment]  # jsonargparse has imported the class
    part = PART_OF.get(setting.rpartition(".")[2], cls.__module__)
    import_all(part)
    found = [getattr(sys.modules.get(module), name, None) for name, module in public_names().items()]
    found += vars(sys.modules[part]).values() if part in sys.modules else []
    kinds = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, cls) and not inspect.isabstract(kind)]
    if not kinds or not setting:
        return lacks(cls)
    choices = did_you_mean("", [kind.__name__ for kind in kinds])
    return f"its class is not given; say --{setting} CLASS too{choices}"  # settings of the base class alone are given


EXAMPLES = {"scorers": "+=CLASS, such as --scorers+=RewardModelScorer --scorers.path runs/first"}
"""Setting that is missing -> end of the message, with an example."""


def _missing(match: re.Match[str], setting: str) -> str:
    place = f"{setting}{setting and '.'}{match[1]}"
    choices = did_you_mean("", backbone_names()) if match[1] == "backbone" else EXAMPLES.get(match[1], "")
    return f"{match[1]} is missing; give it in a --config file or as --{place}{choices}"


REWORDINGS: dict[str, str | Callable[[re.Match[str], str], str]] = {
    r"Expected an? (?P<types>.+)\. Got value: (?P<value>.*)": _wrong_type,
    r"(?:Expected a dot import path string|Unexpected import path format): (\S+)": _unknown_name,
    r"Expected an import path or a subclass spec, but got (.*)": lambda match, setting: (
        f"expected the name of a class, got {'null' if match[1] == 'None' else match[1]}"
        f"{did_you_mean('', names_for(setting))}"
    ),
    MISSING: _missing,
    r"Expected an instantiatable class, but (\S+) is abstract": _abstract,
    r"(No module named '[\w.]+')$": rf"\1 {SEARCHED}",
    "import of callbacks halted": "no module 'callbacks'; say latentreward.callbacks",
    r"Interpolation key '(?:.+' not found \(resolved to '\w+\.)?(.+?)'": rf"${{\1}} {UNSET}",
    r"Import path (\S+) does not correspond to a subclass of (\w+)": _not_a_subclass,
    r"Expected '(\S+)' to be a function that returns <class '(\w+)'>": _not_a_subclass,
    r"unrecognized arguments: --((?:\w+\.)+)help=(\S+).*": _help_of_unknown_class,
    r"Unable to load config '(.*?)' - Parser key \"[\w.]+\": Unable to load config \"\1\"$": (
        r"expected a mapping of settings, or a file with them, got \1"
    ),
    r"Option 'prompts' is not accepted.*": lambda match, setting: (
        match[0] + ("; for prompts from a file say --data PromptDataModule too" if setting == "data" else "")
    ),
    r"Option 'sources' is not accepted.*": r"\g<0>; readers have it: data.train.sources, data.val.sources",
    r"Option '(credit|window)\b.*' is not accepted.*": r"\g<0>; \1 is for TrajectoryGRPOModule",
    r"KeyError raised while resolving interpolation: .Environment variable '(\w+)'": lambda match, setting: (
        f"the environment variable {match[1]}"
        f"{f', which {NAMED_IN[match[1]]} refers to,' if match[1] in NAMED_IN else ''} is not set; say "
        f"{match[1]}=VALUE latentreward ..., or export it"
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


NAMES = {
    "[1, 1e6]": "accumulate_grad_batches num_nodes prefetch_factor batch_size decode_batch_size",
    "[1, 1e9]": "check_val_every_n_epoch train_pairs val_pairs",
    "[0, 1e9]": "gradient_clip_val log_every_n_steps min_epochs every_n_epochs",
    "(0, 1e12]": "limit_train_batches limit_test_batches limit_predict_batches val_check_interval",
    "[0, 1e12]": "telling_pairs limit_val_batches overfit_batches min_steps every_n_train_steps",
    "[-1, 1e9]": "num_sanity_val_steps max_epochs",
    "[-1, 1e12]": "max_steps",
    "[-1, 1e6]": "save_top_k",
    "[0, 1000]": "lr weight_decay candidates.low candidates.high",
    "[0, 1)": "momentum betas dropout",
    "[0, 1]": "eps rms_eps",
    "[0, 9223372036854775807]": "seed data_seed val_seed",
    "[0, 4294967295]": "seed_everything",
    "[0, 1024]": "num_workers processes",
    "[1, 1e12]": "batches_per_epoch flush_every images_per_shard gallery_images max_pixels images_per_prompt best_of "
    "cards .num_prompts .parts",
    "[1, 1024]": "decode_threads",
    "(0, 1e6]": "lora.alpha",
    "[1, 65536]": "lora.rank",
    "[0, 4096]": "t5_length",
    "(0, 1e9]": "timeout rank_timeout_s .hours .tflops peak_tflops",
    "[0, 65535]": "port",
}
"""Interval -> settings whose numbers must lie in it, separated by blanks.

A setting is given by the last part of its dotted name, or by the last two parts. A name that begins with a dot, such as
``.parts``, is a setting of a command itself. In a list, every number must lie in the interval.
"""
RANGES = {name: interval for interval, names in NAMES.items() for name in names.split()}
LARGEST = 10**15
"""Largest absolute value of a setting without a range in ``NAMES``; torch and Python's iterators fail beyond 2⁶³."""
NO_DEFAULT = object()  # placeholder for the default of a parameter that has none


def check_ranges(settings: Any) -> None:
    """Raise InputError if a number among the settings is not finite, or not in the range of its setting."""
    for name, value in leaves(settings):
        *_, owner, last = re.sub(r"\[\d+\]", "", f".{name}").split(".")
        interval = RANGES.get(f"{owner}.{last}") or RANGES.get(last) or f"[-{LARGEST}, {LARGEST}]"
        if value == {} and last in RANGES:  # Lightning would read {} as a time of zero
            raise InputError(f"{name}: {{}} is not a number; give one in {interval}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise InputError(f"{name}: {value} is not finite; give a finite number")
        low, high = map(float, interval[1:-1].split(","))
        if not low <= value <= high or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
            raise InputError(f"{name}: {value} is outside {interval}; give a number inside")


def leaves(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through nested settings; yield (name as on the command line, value) for every value that is not nested.

    Arguments of a class that equal the class's defaults are left out.
    """
    if isinstance(settings, list | tuple):
        for index, item in enumerate(settings):
            yield from leaves(item, f"{place}[{index}]")
    elif isinstance(settings, Mapping | Namespace) and settings != {}:
        settings = settings if isinstance(settings, Mapping) else vars(settings)
        defaults = defaults_of(settings.get("class_path"))
        for name, value in settings.items():
            if name != "init_args" or not isinstance(value, Mapping | Namespace):
                yield from leaves(value, f"{place}.{name}".strip("."))
                continue
            given = vars(value) if isinstance(value, Namespace) else value
            # A default that a class sets itself is allowed, even if its name has a range in NAMES.
            changed = {key: item for key, item in given.items() if repr(item) != repr(defaults.get(key, NO_DEFAULT))}
            yield from leaves(changed, place)
    else:
        yield place, settings


def defaults_of(class_path: Any) -> dict[str, Any]:
    """Return the default arguments of a class or function that parsing has imported; empty for anything else."""
    module, _, name = str(class_path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    try:
        return {name: parameter.default for name, parameter in signature(found).parameters.items()}
    except (TypeError, ValueError):  # not callable, or compiled code without a signature
        return {}
