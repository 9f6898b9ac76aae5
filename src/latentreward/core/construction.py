"""Record of the call that built a backbone or head, so that the call can be written to a file and repeated."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Self


@dataclass(frozen=True)
class Construction:
    """A call of a class or function, recorded as values that JSON can hold.

    Attributes:
        class_path: Import path of the class or function that was called.
        init_args: Arguments by name, in JSON types: tuples became lists, dataclasses became mappings.
    """

    class_path: str
    init_args: dict[str, Any]

    @classmethod
    def of(
        cls, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], skip: int = 0
    ) -> Self | None:
        """Record the call ``target(*args, **kwargs)``; return None if an argument cannot be written as JSON.

        Args:
            target: Class or function.
            args: Positional arguments.
            kwargs: Named arguments.
            skip: Number of leading parameters to leave out because they are not settings, e.g. 1 for a head, whose
                first parameter is the feature spec.
        """
        function, first = (target.__init__, (None,)) if isinstance(target, type) else (target, ())  # type: ignore[misc]
        taken = signature(function)
        try:
            given = dict(taken.bind(*first, *args, **kwargs).arguments)
        except TypeError:
            return None  # the arguments do not fit the signature; the call itself raises the error
        for name in [*taken.parameters][: len(first) + skip]:
            given.pop(name, None)
        for parameter in taken.parameters.values():
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        try:
            plain = json.loads(json.dumps(given, default=dataclasses.asdict))
        except (TypeError, ValueError, RecursionError):
            return None
        return cls(f"{target.__module__}.{target.__qualname__}", plain)
