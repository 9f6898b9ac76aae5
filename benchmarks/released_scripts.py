"""Released training scripts: modules that are imported as they are, and parts of their ``main`` that run as they are.

The loops of these scripts lie in one function, ``main``, which also loads weights and opens process groups. A part of
it is cut out of the file's syntax tree and executed with the names that it reads; not a character is changed.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

STAND_INS = (
    "absl", "hydra.core.config_store", "inflect", "ml_collections", "mmengine.config", "sklearn",
    "torchvision.transforms.functional", "wandb",
)  # fmt: skip
"""Modules that the released code imports and that scoring and training do not need."""
PLACES = {
    "LPO": ("lpo", "lrm/lrm_15"),
    "diffusion-rm": (".",),
    "flow_grpo": (),
    "DiffusionNFT": (),
    "FlowBP": (".",),
}
"""Name of a clone → its folders that hold packages; two clones have a package ``flow_grpo``: see :func:`script`."""


def add_released(root: Path, name: str) -> bool:
    """Make a clone of released code importable; return True.

    Raises:
        SystemExit: If ``root`` does not hold the clone.
    """
    if not (root / name).is_dir():
        raise SystemExit(f"--released={root}: there is no clone {name} in this folder")
    # These look for some of the modules; they must do so before stand-ins are there.
    for library, attribute in (
        ("accelerate", "Accelerator"),
        ("datasets", "load_dataset"),
        ("transformers", "CLIPImageProcessor"),
        ("diffusers", "DiffusionPipeline"),
        ("peft", "get_peft_model"),
    ):
        getattr(import_module(library), attribute)
    for module in STAND_INS:
        parts = module.split(".")
        if parts[0] not in sys.modules and find_spec(parts[0]) is None:
            sys.modules.update({".".join(parts[: n + 1]): MagicMock() for n in range(len(parts))})
    if isinstance(sys.modules.get("mmengine"), MagicMock):  # its registry returns what it registers
        sys.modules["mmengine"].Registry.return_value.register_module.return_value = lambda part: part
    sys.path += [str((root / name / place).resolve()) for place in PLACES[name]]
    return True


@contextmanager
def first_on_path(folder: Path) -> Iterator[None]:
    """Import from ``folder`` before all other places, and forget the modules that come from there afterwards."""
    before, own = set(sys.modules), {path.stem for path in folder.iterdir()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in own:
                del sys.modules[name]


def script(root: Path, name: str, path: str) -> ModuleType:
    """Import the script at ``path`` of a clone, with the packages of this clone alone."""
    add_released(root, name)
    folder = (root / name).resolve()
    spec = spec_from_file_location(f"released_{Path(path).stem}", folder / path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with first_on_path(folder):
        spec.loader.exec_module(module)
    return module


def part_of(module: ModuleType, kind: type[ast.stmt], text: str) -> Callable[[dict[str, Any]], None]:
    """Cut the innermost loop or ``with`` block out of a script's ``main``.

    Args:
        module: The script.
        kind: Kind of the statement: ``ast.For``, ``ast.While`` or ``ast.With``.
        text: What the head of a ``for`` loop, or the whole block of another statement, contains.

    Returns:
        Function that executes the statement with given names in place of those of ``main``. Counters that the statement
        adds to begin at 0; progress bars are off.

    Raises:
        LookupError: If ``main`` has no such statement.
    """
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    main = next(part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "main")
    found = [
        part
        for part in ast.walk(main)
        if isinstance(part, kind) and text in ast.unparse(part.iter if isinstance(part, ast.For) else part)
    ]
    if not found:
        raise LookupError(f"{module.__file__}: main has no {kind.__name__} with {text!r}")
    code = compile(ast.Module([found[-1]], []), module.__file__, "exec")
    added = [part.target for part in ast.walk(found[-1]) if isinstance(part, ast.AugAssign)]
    counters = {target.id: 0 for target in added if isinstance(target, ast.Name)}

    def run(names: dict[str, Any]) -> None:
        exec(code, {**vars(module), "tqdm": lambda items, **_: items, "wandb": MagicMock(), **counters, **names})

    return run
