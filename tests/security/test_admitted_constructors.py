"""No class that a setting may name under ``--restrict-imports`` loads a library, unpickles, or starts a program.

The classes are found by type: from the types of the commands' settings to their subclasses in the trusted packages, and
on to the types of these classes' settings. Each is constructed with files that would show that their code ran.
"""

import importlib
import inspect
import json
import os
import pickle
import pkgutil
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import pytest
import torch

from latentreward.programs import constructing
from latentreward.settings.functions import import_class_modules
from latentreward.settings.restrictions import TRUSTED, UNTRUSTED, limits_of, restrict_imports
from tests.processes import Forked

UNIMPORTED = ("torch.testing._internal", "torch._inductor", "torch._vendor", "latentreward.__main__")
"""Modules that are not searched: imports of them run tests, or take minutes."""
EVENTS = ("ctypes.dlopen", "pickle.find_class", "exec", "import", "subprocess.Popen", "os.system", "os.posix_spawn")


CONTROL = "torch.cuda.memory.CUDAPluggableAllocator"
"""A class that loads a library, which no setting takes: what is looked for is seen here."""


class Payload:
    """Names a function as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getpid, ()


def modules_below(package: str) -> Iterator[str]:
    """Import a package and what lies below it; yield the names."""
    with suppress(BaseException):  # an optional dependency is missing
        module = importlib.import_module(package)
        yield package
        for found in pkgutil.iter_modules(vars(module).get("__path__", ()), f"{package}."):
            if not found.name.startswith(UNIMPORTED):
                yield from modules_below(found.name)


def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    with suppress(Exception):
        return get_type_hints(function)
    return {}


def admitted() -> set[type]:
    """Classes that settings may name, by the types of settings."""
    import_class_modules()
    modules = [name for package in TRUSTED for name in modules_below(package)]
    commands = [sys.modules[name] for name in modules if name.startswith("latentreward.apps.commands.")]
    functions = [one for module in commands for one in vars(module).values() if inspect.isfunction(one)]
    trainer = sys.modules["lightning.pytorch"]
    open_types = [kind for function in functions for kind in settings_of(function).values()]
    open_types += [trainer.Trainer, trainer.LightningModule, trainer.LightningDataModule]
    found: set[type] = set()
    while open_types:
        for limit in limits_of(open_types.pop()):
            below = [limit]
            while below:
                kind = below.pop()
                if kind in found or not kind.__module__.startswith(tuple(f"{one}." for one in TRUSTED)):
                    continue
                found.add(kind)
                open_types += [inner for base in kind.__mro__ for inner in settings_of(base.__init__).values()]
                with suppress(TypeError):
                    below += kind.__subclasses__()
    return {kind for kind in found if not kind.__module__.startswith(UNTRUSTED)}


def construct(kind: type, text: str) -> None:
    """Construct a class with ``text`` wherever its settings take one, in the ways that a setting may be given."""
    parameters = parameters_of(kind)
    needed = {one.name: text for one in parameters if one.default is one.empty}
    optional = {one.name: text for one in parameters if one.default is None or isinstance(one.default, str)}
    for arguments in (needed, needed | optional, *({**needed, name: text} for name in optional)):
        with suppress(BaseException):
            kind(**arguments)


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """Parameters of a constructor, with those of the base class if it passes others on."""
    try:
        own = list(inspect.signature(kind.__init__).parameters.values())[1:]
    except (TypeError, ValueError):  # compiled code without a signature
        return []
    passes_on = any(one.kind is one.VAR_KEYWORD for one in own)
    bases = parameters_of(kind.__mro__[1]) if passes_on and len(kind.__mro__) > 1 else []
    return [one for one in own if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)] + bases


def construct_all(canaries: list[str], result: Path) -> None:
    warnings.simplefilter("ignore")
    kinds = sorted(admitted(), key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
    seen: list[list[str]] = []
    current = [""]

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        shown = " ".join(str(getattr(one, "co_filename", one)) for one in arguments[:2])
        if event in EVENTS and (event == "pickle.find_class" or any(name in shown for name in ("canary", "posix"))):
            seen.append([current[0], event, shown])

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    sys.addaudithook(record)
    restrict_imports([], [])
    signal.signal(signal.SIGALRM, stop)
    with constructing():
        for kind in [*kinds, torch.cuda.memory.CUDAPluggableAllocator]:
            current[0] = f"{kind.__module__}.{kind.__qualname__}"
            for canary in canaries:
                signal.setitimer(signal.ITIMER_REAL, 0.3, 0.1)  # again, if the class holds on
                with suppress(BaseException):
                    construct(kind, canary)
                signal.setitimer(signal.ITIMER_REAL, 0)
    result.write_text(json.dumps({"classes": [f"{kind.__module__}.{kind.__name__}" for kind in kinds], "seen": seen}))


@pytest.mark.slow
def test_no_admitted_constructor_runs_code(tmp_path: Path) -> None:
    library = next(Path(torch.__file__ or "").parent.glob("_C*.so"))
    shutil.copy(library, tmp_path / "canary.so")
    (tmp_path / "canary.pt").write_bytes(pickle.dumps(Payload()))
    (tmp_path / "canary.py").write_text("class Canary:\n    pass\n")
    canaries = [str(tmp_path / "canary.so"), str(tmp_path / "canary.pt"), "canary.Canary"]
    result = tmp_path / "result.json"
    process = Forked(construct_all, [canaries, result], cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert process.wait(600) == 0, process.stderr[-2000:]
    found = json.loads(result.read_text())
    assert {"lightning.pytorch.strategies.ddp.DDPStrategy", "torch.optim.adamw.AdamW"} <= {*found["classes"]}
    assert CONTROL not in found["classes"]
    assert {name for name, *_ in found["seen"]} == {CONTROL}
