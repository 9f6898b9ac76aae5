"""Import paths of earlier releases, which saved configs and users' own code may still contain."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "latentreward.checkpoint_files": "latentreward.checkpoints.files",
    "latentreward.data.prompts": "latentreward.data.alignment.prompts",
    "latentreward.data.prompts_and_images": "latentreward.data.alignment.prompts_and_images",
    "latentreward.inference": "latentreward.generation",
    "latentreward.heads.logistic": "latentreward.heads.gated_qformer",
    "latentreward.pages": "latentreward.reports",
    "latentreward.scoring.stored": "latentreward.scoring.layouts.find",
    "latentreward.strategies": "latentreward.checkpoints.fsdp2",
}
"""Import path of a module or package in an earlier release → its present import path."""


class MovedModules(MetaPathFinder, Loader):
    """Import hook that resolves an earlier import path to the present module, one module object under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec if ``fullname`` is an earlier import path, or lies inside an earlier package; else None."""
        return ModuleSpec(fullname, self) if today(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        """Import the present module and register it in ``sys.modules`` under the earlier name too."""
        sys.modules[module.__name__] = import_module(today(module.__name__))


def today(name: str) -> str:
    """Return the present import path of an earlier one; any other name is returned unchanged."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        if new := MOVED.get(".".join(parts[:length])):
            return ".".join([new, *parts[length:]])
    return name


# At the front of the list: an earlier package name is an alias of a present package. Python's own finder would look
# into that package's folder and load a second copy of a module, whose classes differ from those of the first copy.
sys.meta_path.insert(0, MovedModules())
