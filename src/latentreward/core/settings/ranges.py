"""Ranges of numeric settings that their types do not state, above all of Lightning's Trainer and torch's optimizers."""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from jsonargparse import Namespace

from latentreward.core.errors import InputError

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
MISSING = object()  # placeholder for the default of a parameter that has none


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
            changed = {key: item for key, item in given.items() if repr(item) != repr(defaults.get(key, MISSING))}
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
