"""How a backbone or head was made: which class or function was called, and with what, so that a file can tell it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Self


@dataclass(frozen=True)
class Construction:
    """A call in plain values.

    Attributes:
        class_path: Import path of the class or function.
        init_args: Arguments by name, as JSON reads them: lists for tuples, mappings for dataclasses.
    """

    class_path: str
    init_args: dict[str, Any]

    @classmethod
    def of(
        cls, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], skip: int = 0
    ) -> Self | None:
        """Describe the call ``target(*args, **kwargs)``; None if an argument is not a plain value.

        Args:
            target: Class or function.
            args: Positional arguments.
            kwargs: Named arguments.
            skip: First parameters that are no settings, such as a head's feature spec.
        """
        function, first = (target.__init__, (None,)) if isinstance(target, type) else (target, ())  # type: ignore[misc]
        parameters = signature(function).parameters.values()
        try:
            given = dict(signature(function).bind(*first, *args, **kwargs).arguments)
        except TypeError:
            return None  # and the call itself says what is wrong
        for parameter in [*parameters][: len(first) + skip]:
            given.pop(parameter.name, None)
        for parameter in parameters:
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        try:
            plain = json.loads(json.dumps(given, default=dataclasses.asdict))
        except (TypeError, ValueError, RecursionError):
            return None
        return cls(f"{target.__module__}.{target.__qualname__}", plain)
